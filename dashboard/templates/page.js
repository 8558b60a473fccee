/* What the page does by itself: puts new parts in their places, says times in the viewer's zone, and how old its data is. */
window.zcinfer = (function () {
  "use strict";
  const shown = {};
  let paused = false, arrived = null, figure = null, source = null, spoken = null;
  const id = (name) => document.getElementById(name);
  const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
  const day = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

  function times(within) {
    for (const time of within.querySelectorAll("time[data-at]")) {
      const date = new Date(1000 * Number(time.dataset.at));
      const far = "date" in time.dataset || Math.abs(Date.now() - date) > 86400e3;
      time.textContent = (far ? day : clock).format(date);
      time.dateTime = date.toISOString();
    }
  }

  function put(name, html) {
    if (shown[name] === html) return;
    shown[name] = html;
    const place = id("part-" + name);
    const open = [...place.querySelectorAll("details[open]")].map((one) => one.dataset.key);
    const scrolled = [...place.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
    const texts = [...place.querySelectorAll("details[open] pre")].map((one) => one.scrollTop);
    const focused = place.contains(document.activeElement) ? [...place.querySelectorAll("a, summary, [tabindex]")].indexOf(document.activeElement) : -1;
    place.innerHTML = html;
    for (const one of place.querySelectorAll("details")) one.open = open.includes(one.dataset.key);
    place.querySelectorAll(".scroll").forEach((one, number) => { one.scrollLeft = scrolled[number] || 0 });
    place.querySelectorAll("details[open] pre").forEach((one, number) => { one.scrollTop = texts[number] || 0 });
    if (focused >= 0) place.querySelectorAll("a, summary, [tabindex]")[focused]?.focus({ preventScroll: true });
    times(place);
  }

  function update() {
    const names = source.data.name, html = source.data.html;
    for (let row = 0; row < names.length; row++) {
      if (names[row] === "age") { if (html[row] !== "-") arrived = { age: html[row] === "" ? null : Number(html[row].split(" ")[0]), at: performance.now() } }
      else put(names[row], html[row]);
    }
    const word = document.querySelector(".state").dataset.word;
    if (word !== spoken) id("spoken").textContent = spoken = word;
    age();
  }

  function age() {
    if (arrived === null || paused) return;
    const silent = (performance.now() - arrived.at) / 1000;
    const seconds = arrived.age === null ? null : arrived.age + silent;
    const late = seconds === null ? silent > 5 : seconds > 5;
    id("page").classList.toggle("late", late);
    id("age").textContent = silent > 5 ? "This page has lost the program that serves it (" + Math.round(silent) + " s ago)"
      : seconds === null ? "No data yet"
      : "Data " + (seconds < 2 ? seconds.toFixed(1) : Math.round(seconds)) + " s old";
  }

  function colours() {
    if (figure === null) return;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue("--" + name).trim();
    const set = (model, values) => model.setv(values, { sync: false });
    for (const axis of [...figure.below, ...figure.left]) set(axis, { major_label_text_color: colour("muted") });
    for (const grid of figure.center.filter((one) => "grid_line_color" in one)) set(grid, { grid_line_color: colour("line") });
    for (const renderer of figure.renderers) {
      const part = renderer.name === "all" ? "accent" : null;
      if (part && renderer.glyph.type === "Line") set(renderer.glyph, { line_color: colour(part) });
      if (part && renderer.glyph.type === "VArea") set(renderer.glyph, { fill_color: colour(part) });
    }
  }

  function span(minutes) {
    for (const button of document.querySelectorAll("[data-minutes]"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.minutes) === minutes));
    figure.x_range.setv({ follow_interval: minutes * 60000 }, { sync: false });
  }

  function start(models) {
    ({ source, figure } = models);
    colours();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", colours);
    for (const button of document.querySelectorAll("[data-minutes]"))
      button.addEventListener("click", () => span(Number(button.dataset.minutes)));
    const pause = id("pause");
    if (pause !== null) {
      update();
      pause.addEventListener("click", () => {
        paused = !paused;
        pause.setAttribute("aria-pressed", String(paused));
        pause.textContent = paused ? "Go on" : "Pause";
        if (paused) id("age").textContent = "Paused at " + clock.format(new Date());
        source.tags = paused ? ["paused"] : [];
      });
      setInterval(age, 1000);
    }
    id("page").dataset.ready = "yes";
  }

  document.addEventListener("DOMContentLoaded", () => times(document));
  return { start, update };
})();
