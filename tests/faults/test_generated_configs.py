"""1,000 generated configs: what cannot run is refused by the path of a value, and writes nothing.

Ready experiments and the tiny run, damaged: other types, numbers out of range, NaN, keys missing
or unknown, other kinds, absurd sizes, parts that contradict each other, broken YAML.
"""

from __future__ import annotations

import copy
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pipelines.config_io import ConfigError, load_config
from pipelines.launch import prepare_run
from storage_schemas.config import RunConfig
from storage_schemas.run_store import RunStore
from tests.conftest import TINY

COMMANDS = 10
BASES = [
    TINY,
    *(yaml.safe_load(p.read_text()) for p in sorted(Path("deploy/experiments").glob("*.yaml"))),
]
Keys = tuple[Any, ...]
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

HUGE = 10**9
VALUES: list[Any] = [
    *(None, True, False, "", " ", "many", "é漢\U0001f600", "a\0b", "x" * 10_000),
    *(0, 1, 2, 3, 7, -1, 64, 65_537, HUGE, 2**63 - 1, 2**63, 10**400, -(10**400)),
    *(0.0, 0.5, 1.0, 1.5, -0.5, 1e-300, 1e-30, 1e30, 1e308, -1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf"), "nan", "1e3", "16"),
    *([], [1], [0, 16], [16, 0], [1, 2, 3], [[1]], [None], ["a"], [HUGE], [HUGE, HUGE, HUGE]),
    *([0.5, 0.5], [1e308, 1e308], [-1e308, 1e308], [0.0, 1e-320], list(range(200))),
    *({}, {"kind": "fog"}, {"kind": 3}, {"kind": None}, {"kind": []}, {1: 2}, {None: None}),
    *({"": ""}, {"a": {"b": {"c": {}}}}, {"kind": "custom", "target": "no_such:Thing"}),
]
ODD = ["!!python/object:os.system {}", "2026-02-30", "2026-02-03", "!!int x", "!!binary '&'"]
ODD += ["!!set {a, b}", "&a [*a]", "*nothing", "? [a]\n: b", "{a: 1, a: 2}", "'", "[" * 5000]
ODD += [
    "!!timestamp x",
    "0x" + "F" * 5000,
    "!!float ''",
    "<<: 3",
    "!!omap [a]",
    "\t",
    "{]",
    "@",
    '"\\ud800"',
]

# Whole sections that fit some of the configs and contradict others.
SECTIONS: dict[str, list[dict[str, Any]]] = {
    "data": [
        {"kind": "digits", "holdout": 1796, "limit": HUGE},
        {"kind": "digits", "limit": 10, "holdout": 10},
        {"kind": "digits", "phase": "smooth"},
        {"kind": "digits", "phase": "smooth", "value_range": [0, 16]},
        {"kind": "digits", "value_range": [16, 0]},
        {"kind": "manifold", "samples": HUGE, "holdout": 10},
        {"kind": "photos", "samples": HUGE, "holdout": 10},
        {"kind": "photos", "downscale": 64, "samples": 100, "holdout": 10},
        {"kind": "photos", "size": 24, "bands": 1, "samples": 64, "holdout": 8},
        *(
            {"kind": "store", "url": url, "x_shape": shape, "value_range": [0, 1]}
            for url, shape in [
                ("nowhere", [1, 8, 8]),
                ("nowhere", [3, 10**6, 10**6]),
                ("README.md", [1, 8, 8]),
                ("n" * 5000, [1, 8, 8]),
                ("no\0where", [1, 8, 8]),
                ("xyz://nowhere", [1, 8, 8]),
                ("memory://nowhere", [1, 8]),
                ("s3://key:secret-of-mine@bucket/x", [1, 8, 8]),
            ]
        ),
    ],
    "channel": [
        {"kind": "random_mask", "keep": 0.5, "noise_std": 1e300},
        {"kind": "random_matrix", "rows": HUGE},
        {"kind": "random_matrix", "rows": 6},
        {"kind": "denoising", "noise_std": 1.0},
        {"kind": "super_resolution", "factor": HUGE, "noise_std": 0.1},
        {"kind": "super_resolution", "factor": 4, "noise_std": 0.1, "operators": "observed"},
        {"kind": "gaussian_blur", "sigma": [2.0, 1.0], "noise_std": 0.1},
        {"kind": "gaussian_blur", "sigma": 1e300, "noise_std": 0.1},
        {"kind": "compressed_sensing", "measurements": HUGE, "noise_std": 0.1},
        {"kind": "compressed_sensing", "measurements": 8, "noise_std": 0.1, "seed": 2**64},
        {"kind": "mri", "acceleration": 1e9, "center": 0.9, "noise_std": 0.1},
        {"kind": "poisson", "gain": 1e-300},
        {"kind": "poisson", "gain": 1e300},
        {"kind": "quantization", "low": 3, "high": 2, "levels": 4},
        {"kind": "quantization", "low": 0, "high": 16, "levels": 10**18},
        {"kind": "jpeg", "quality": 50, "low": 0, "high": 0},
        {"kind": "jpeg", "quality": 50, "low": -1e308, "high": 1e308},
        {"kind": "deepinv", "physics": "Denoising", "noise": {"name": "GaussianNoise"}},
        {"kind": "deepinv", "physics": "BlurFFT", "arguments": {"filter": [[1, "a"]]}},
        {"kind": "deepinv", "physics": "Inpainting", "arguments": {"mask": HUGE}},
        {"kind": "deepinv", "physics": "system", "arguments": {"img_size": [HUGE, HUGE]}},
        {"kind": "custom", "target": "builtins:dict"},
        {"kind": "custom", "target": "builtins:int", "arguments": {"base": 3}},
        {"kind": "custom", "target": "math:sqrt"},
        {"kind": "custom", "target": "json:loads", "arguments": {"cls": "x"}},
    ],
    "network": [
        {"kind": "unet", "channels": [HUGE], "blocks": [1], "attention": {}},
        {"kind": "unet", "channels": [65_536] * 3, "blocks": [100] * 3},
        {"kind": "unet", "channels": [8] * 12, "blocks": [1] * 12, "attention": {}},
        {"kind": "unet", "channels": [8], "blocks": [HUGE], "attention": {}},
        {"kind": "unet", "channels": [8, 8], "blocks": [1, 1], "attention": {0: 3}},
        {"kind": "unet", "channels": [8, 8], "blocks": [1, 1], "attention": {"a": 3}},
        {"kind": "unet", "channels": [8], "blocks": [1], "attention": {}, "embedding": 65_536},
        {"kind": "mlp", "hidden": [HUGE]},
        {"kind": "mlp", "hidden": [65_536] * 4, "embedding": 3},
        {"kind": "mlp", "hidden": [8], "embedding": 2},
        {"kind": "diffusers", "arguments": {"block_out_channels": [HUGE]}},
        {"kind": "custom", "target": "torch.nn:Identity"},
        {"kind": "custom", "target": "builtins:print"},
    ],
    "start": [
        {"kind": "gaussian", "rank": HUGE},
        {"kind": "pseudo_inverse"},
        {"kind": "mmps", "laps": 1},
        {"kind": "mmps", "laps": HUGE},
        *({"kind": "model", "url": url} for url in ("nowhere", "README.md", "deploy", "a\0")),
        {"kind": "model", "url": "n" * 5000},
        {"kind": "model", "url": "xyz://nowhere"},
    ],
    "schedule": [
        {"kind": "ve_karras", "sigma_min": 1e-300, "sigma_max": 1e300},
        {"kind": "ve_karras", "sigma_min": 1e-9, "sigma_max": 1e9, "rho": 0.1},
        {"kind": "ve_karras", "sigma_min": 1, "sigma_max": 1},
        {"kind": "ve_log_linear", "sigma_min": 10, "sigma_max": 1},
    ],
    "time": [
        {"kind": "beta", "a": 1e-300, "b": 1e300},
        {"kind": "beta", "a": 1e6, "b": 1e-2},
        {"kind": "beta_mixture", "first": [1e6, 1e6], "second": [1e-2, 1e-2]},
        {"kind": "log_normal", "mean": 1e300, "std": 1e-300},
        {"kind": "log_normal", "mean": 0.0, "std": 1e300},
    ],
    "e_step": [
        {"sampler": {"kind": "ddim", "steps": HUGE}},
        {"sampler": {"kind": "heun", "steps": 1, "grid": {"kind": "karras", "rho": 1e300}}},
        {"sampler": {"kind": "ddpm", "steps": 4, "sigma_start": 1e-3, "sigma_end": 1e2}},
        {"sampler": {"kind": "predictor_corrector", "corrections": HUGE}},
        {"sampler": {"kind": "ddim", "steps": 4}, "annealing": {"first": 5}},
        {"batch_size": HUGE, "shard_size": HUGE},
    ],
    "m_step": [
        {"steps": HUGE, "batch_size": HUGE},
        {"steps": 10, "augmentation": {"hue": 0.1}},
        {"steps": 10, "augmentation": {"saturation": [2.0, 1.0]}},
        {"steps": 10, "learning_rate": {"kind": "cosine", "over": "run"}, "first_steps": HUGE},
        {"steps": 10, "validation": {"patience": 1}, "recorruption": "fixed"},
    ],
    "evaluation": [
        {"draws": HUGE},
        {"draws": 2, "reconstructions": HUGE},
        {"distance": {"kind": "sinkhorn", "samples": HUGE}},
        {"distance": {"kind": "sliced_wasserstein", "projections": 10**15}},
        {"distance": {"kind": "frechet_classifier"}},
    ],
    "prior": [
        {"kind": "joint"},
        {"kind": "joint", "samples": HUGE},
        {"kind": "unconditional", "steps": 1, "learning_rate": {"kind": "linear", "over": "run"}},
    ],
    "mmps": [{"covariance": "cov_x", "rank": HUGE}, {"solver_iterations": HUGE}],
    "runner": [
        {"device": "cuda:99"},
        {"kind": "ray", "address": "ray://user:secret-of-mine@host:1"},
        {"kind": "local", "memory_gb": 1e300},
    ],
}
KINDS = ["value", "value", "key", "missing", "top", *["section"] * 6]
TOP = {
    "method": ["em-mmps", "em", None],
    "condition": ["gaussian_mean", "x"],
    "iterations": [1, HUGE, 10**5],
    "seed": [2**63 - 1, 2**63],
    "name": ["", "Ä", "a" * 64, "../x"],
}


def places(data: Any, keys: Keys = ()) -> Iterator[Keys]:
    yield keys
    if isinstance(data, dict):
        for key, value in data.items():
            yield from places(value, (*keys, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from places(value, (*keys, index))


def put(data: Any, keys: Keys, value: Any) -> Any:
    if not keys:
        return value
    inside = data
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    return data


@st.composite
def mutants(draw: st.DrawFn) -> tuple[str, Keys | None]:
    """Text of a config, and the place that was changed if it was one and the text is YAML."""
    data = copy.deepcopy(draw(st.sampled_from(BASES)))
    changed: list[Keys | None] = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        every = list(places(data))
        match draw(st.sampled_from(KINDS)):
            case "value":
                keys = draw(st.sampled_from(every))
                data = put(data, keys, copy.deepcopy(draw(st.sampled_from(VALUES))))
            case "key" if isinstance(data, dict):
                inside = draw(st.sampled_from([k for k in every if isinstance(at(data, k), dict)]))
                name = draw(st.sampled_from(["stepz", "", "kind", "a b", "é", "__class__", "url"]))
                keys = (*inside, name)
                data = put(data, keys, draw(st.sampled_from(VALUES[:20])))
            case "missing" if len(every) > 1:
                keys = draw(st.sampled_from(every[1:]))
                del at(data, keys[:-1])[keys[-1]]
            case "section" if isinstance(data, dict):
                name = draw(st.sampled_from(sorted(SECTIONS)))
                keys = (name,)
                section = copy.deepcopy(draw(st.sampled_from(SECTIONS[name])))
                old = data.get(name)
                if isinstance(old, dict) and "kind" not in section:
                    section = {**old, **section}
                data[name] = section
            case "top" if isinstance(data, dict):
                name = draw(st.sampled_from(sorted(TOP)))
                keys = (name,)
                data[name] = draw(st.sampled_from(TOP[name]))
            case _:
                continue
        changed.append(keys)
        if not isinstance(data, dict):
            break
    text = yaml.dump(data, Dumper=DUMPER, sort_keys=False, allow_unicode=True)
    one = changed[0] if len(changed) == 1 else None
    if draw(st.integers(0, 9)) == 0:
        one = None
        lines = text.splitlines(keepends=True)
        where = draw(st.integers(0, max(0, len(lines) - 1)))
        match draw(st.sampled_from(["cut", "twice", "odd", "character"])):
            case "cut":
                text = text[: draw(st.integers(0, len(text)))]
            case "twice" if lines:
                lines.insert(where, lines[where])
                text = "".join(lines)
            case "odd" if lines:
                key = lines[where].partition(":")[0]
                lines[where] = f"{key}: {draw(st.sampled_from(ODD))}\n"
                text = "".join(lines)
            case _:
                place = draw(st.integers(0, len(text)))
                character = draw(st.sampled_from("{}[]:,&*!|>'\"%@`\t\0\ufeff\x07#-"))
                text = text[:place] + character + text[place:]
    return text, one


def at(data: Any, keys: Keys) -> Any:
    for key in keys:
        data = data[key]
    return data


def known_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Paths of all values that a config can have."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in models_in(field.annotation):
            yield from known_paths(inner, f"{prefix}{name}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


KNOWN = set(known_paths(RunConfig))


def named_places(message: str, text: str) -> set[str]:
    """Return the paths in a message that are places of the file, or that a config can have."""
    try:
        data = yaml.load(text, LOADER)
        existing = {".".join(str(key) or "''" for key in keys) for keys in places(data)}
    except (yaml.YAMLError, ValueError, RecursionError):
        existing = set()
    found = set()
    for line in message.splitlines():
        head = line.strip().partition(": ")[0]
        around = {head, head.rpartition(".")[0]}  # it, or where it is missing
        if "goes on for more than" in line:  # an alias that never ends: no path to its end
            around.add(head.partition(".")[0])
        if around & (existing | KNOWN):
            found.add(head)
        for word in line.replace("'", " ").replace("`", " ").split():
            path = word.strip(".,;:()")
            if path in KNOWN | existing and ("." in path or f"{path} is" in line):
                found.add(path)
    return found - {""}


def is_named(message: str, keys: Keys, text: str) -> bool:
    """Tell whether a message names a changed place, one around it, or one inside it."""
    path = ".".join(str(key) or "''" for key in keys)
    lines = [line.strip() for line in message.splitlines()]
    if not keys:
        return True  # everything was replaced
    if any(line.startswith((f"{path}:", f"{path}.")) for line in lines):
        return True
    around = [".".join(str(k) or "''" for k in keys[:n]) for n in range(1, len(keys))]
    return any(line.startswith(f"{p}:") for line in lines for p in around) or bool(
        {p.split(".")[0] for p in named_places(message, text)}
    )


@pytest.mark.parametrize("configs", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_generated_configs(configs: int, tmp_path: Path, home: dict[str, str]) -> None:
    path, run = tmp_path / "config.yaml", tmp_path / "run"
    counted: Counter[str] = Counter()
    refused: list[str] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest: list[tuple[float, str]] = []

    @settings(
        max_examples=configs,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(mutants())
    def each(mutant: tuple[str, Keys | None]) -> None:
        text, changed = mutant
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        began = time.process_time()
        try:
            config = load_config(str(path))
            prepare_run(config, str(run), take_over=False)
        except ValueError as error:  # exit status 2; anything else is no mistake of the caller's
            message = str(error)
            counted["config" if isinstance(error, ConfigError) else "check"] += 1
            refused.append(text)
            assert not run.exists(), "a refused config wrote something"
            assert "secret-of-mine" not in message
            assert len(message) < 20_000
            whole_file = (
                " is not valid YAML",
                " holds a",
                " holds nothing",
                " is not a text file",
            )
            if not any(words in message for words in whole_file):
                assert named_places(message, text) or "unknown key" in message, message
                if changed is not None:
                    assert is_named(message, changed, text), (changed, message)
        else:
            counted["accepted"] += 1
            assert RunStore.open(str(run)).config == config
            shutil.rmtree(run)
        slowest.append((time.process_time() - began, text))

    each()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # hypothesis ends earlier only if it has tried every config there is.
    assert sum(counted.values()) >= configs
    assert counted["config"] > configs / 4
    assert counted["check"] > configs / 20
    assert counted["accepted"] > configs / 20
    # Nothing large is built; PyTorch and deepinv, where not imported yet, take 700 MB.
    assert grown < 1_500_000, f"memory grew by {grown / 1e6:.1f} GB"
    seconds, text = max(slowest)
    assert seconds < 10, f"{seconds:.1f} s of processor for\n{text}"
    for text in refused[:: len(refused) // COMMANDS][:COMMANDS]:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "run", str(path), "--store", str(run)],
            env=home,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2, f"{done.returncode}: {done.stderr}\n{text}"
        assert done.stderr.startswith("diffem: ")
        assert "Traceback" not in done.stderr
        assert not done.stdout
        assert not run.exists()


ABSURD: dict[str, tuple[dict[str, Any], str]] = {
    "widths": ({"network": SECTIONS["network"][0]}, r"network\.channels\.0: received 1000000000"),
    "weights": (
        {"network": {"kind": "unet", "channels": [65_536] * 3, "blocks": [100] * 3}},
        r"network: [\d,]+ weights, five times each take [\d,.]+ GiB or more",
    ),
    "samples": ({"data": {"kind": "manifold", "samples": HUGE * 10}}, r"data\.samples: received"),
    "patches": (
        {"data": {"kind": "photos", "samples": HUGE}, "evaluation": {"draws": 2}},
        r"data\.samples is 1000000000 but the photographs hold \d+ patches",
    ),
    "sampler steps": (
        {"e_step": {"sampler": {"kind": "ddim", "steps": HUGE}}},
        r"e_step\.sampler\.steps: received 1000000000",
    ),
    "batches": (
        {"m_step": {"steps": 1, "batch_size": HUGE}},
        r"m_step\.batch_size: a batch of 1,000,000,000 samples take",
    ),
    "draws": ({"evaluation": {"draws": HUGE}}, r"evaluation\.draws: .* posterior samples take"),
    "directions": (
        {"evaluation": {"distance": {"kind": "sliced_wasserstein", "projections": 10**12}}},
        r"evaluation\.distance\.projections: 1,000,000,000,000 directions take",
    ),
    "iterations": ({"iterations": HUGE}, r"iterations: received 1000000000"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_sizes_are_refused_and_not_tried(case: str, tmp_path: Path) -> None:
    changes, expected = ABSURD[case]
    path, run = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    began = time.process_time()
    with pytest.raises(ValueError, match=expected):
        prepare_run(load_config(str(path)), str(run), take_over=False)
    assert not run.exists()
    assert time.process_time() - began < 10  # 0.02 s, or 3 s where PyTorch is not imported yet


def test_an_alias_that_grows_is_neither_unfolded_nor_shown(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]" for n in range(9)]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join([*lines, "name: *a9"]))
    with pytest.raises(ConfigError, match=r"goes on for more than 10,000 values") as error:
        load_config(str(path))
    assert len(str(error.value)) < 1000


def test_a_key_that_comes_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(TINY) + "iterations: 99\n")
    with pytest.raises(ConfigError, match=r"the key 'iterations' comes twice"):
        load_config(str(path))


def test_a_value_of_several_types_is_named_by_its_path_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    channel = {"kind": "gaussian_blur", "sigma": [1.2], "noise_std": 0.4}
    path.write_text(yaml.safe_dump({**TINY, "channel": channel}))
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    places = [line.partition(": ")[0] for line in str(error.value).splitlines()[1:]]
    assert places == ["  channel.sigma", "  channel.sigma.1"]
