(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);

  // Values of the nearest point, under the pointer or the finger.
  const tip = byId("tip");
  for (const plot of document.querySelectorAll(".plot")) {
    const points = [...plot.querySelectorAll(".point")];
    if (!points.length) continue;
    for (const point of points) {
      const title = point.querySelector("title");
      point.dataset.tip = title.textContent;
      title.remove();
    }
    let shown = null;
    const hide = () => {
      if (shown) shown.classList.remove("on");
      shown = null;
      tip.hidden = true;
    };
    const show = (event) => {
      let nearest = null;
      let least = Infinity;
      for (const point of points) {
        const box = point.getBoundingClientRect();
        const distance = Math.abs(box.x + box.width / 2 - event.clientX);
        if (distance < least) [nearest, least] = [point, distance];
      }
      if (shown && shown !== nearest) shown.classList.remove("on");
      shown = nearest;
      shown.classList.add("on");
      tip.textContent = shown.dataset.tip;
      tip.hidden = false;
      const box = shown.getBoundingClientRect();
      const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
      const left = Math.max(8, Math.min(box.x + box.width / 2 - tip.offsetWidth / 2, room));
      tip.style.left = `${left + window.scrollX}px`;
      tip.style.top = `${box.y + window.scrollY - tip.offsetHeight - 8}px`;
    };
    plot.addEventListener("pointermove", show);
    plot.addEventListener("pointerdown", show);
    plot.addEventListener("pointerleave", hide);
  }

  // Pictures: a scrubber over the steps, and a viewer that enlarges them.
  const pictures = [...document.querySelectorAll(".gallery img")];
  if (!pictures.length) return;
  const scrub = byId("scrub");
  const featured = document.querySelector("#featured .zoom");
  const feature = (place) => {
    const picture = pictures[place];
    const image = featured.querySelector("img");
    image.src = picture.src;
    image.alt = picture.alt;
    featured.dataset.place = place;
    byId("featured-name").textContent = picture.dataset.name;
    byId("scrub-name").textContent = picture.dataset.name;
    scrub.setAttribute("aria-valuetext", picture.dataset.name);
    scrub.value = place;
  };
  if (scrub) {
    document.querySelector(".player").hidden = false;
    scrub.setAttribute("aria-valuetext", byId("scrub-name").textContent);
    scrub.addEventListener("input", () => feature(Number(scrub.value)));
    const play = byId("play");
    let timer = null;
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
    };
    play.addEventListener("click", () => {
      if (timer) return stop();
      play.textContent = "Pause";
      let place = Number(scrub.value) === pictures.length - 1 ? 0 : Number(scrub.value);
      feature(place);
      timer = setInterval(() => {
        place += 1;
        feature(place);
        if (place === pictures.length - 1) stop();
      }, 700);
    });
  }

  const viewer = byId("viewer");
  const stage = viewer.querySelector(".stage");
  let place = 0;
  const view = (wanted) => {
    place = Math.max(0, Math.min(pictures.length - 1, wanted));
    const image = byId("viewer-image");
    image.src = pictures[place].src;
    image.alt = pictures[place].alt;
    byId("viewer-name").textContent = pictures[place].dataset.name;
    byId("previous").disabled = place === 0;
    byId("next").disabled = place === pictures.length - 1;
  };
  for (const link of document.querySelectorAll(".zoom")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      view(Number(link.dataset.place));
      stage.classList.remove("full");
      viewer.showModal();
    });
  }
  byId("previous").addEventListener("click", () => view(place - 1));
  byId("next").addEventListener("click", () => view(place + 1));
  byId("close").addEventListener("click", () => viewer.close());
  stage.addEventListener("click", () => stage.classList.toggle("full"));
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") view(place - 1);
    if (event.key === "ArrowRight") view(place + 1);
  });
})();
