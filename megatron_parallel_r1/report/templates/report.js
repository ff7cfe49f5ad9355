"use strict";
(() => {
  document.documentElement.classList.add("js");

  // Curves: the nearest step under the pointer, read off.
  for (const panel of document.querySelectorAll(".panel")) {
    const svg = panel.querySelector("svg");
    const tip = panel.querySelector(".reading-off");
    const points = JSON.parse(panel.dataset.points);
    const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    const dot = document.createElementNS(svg.namespaceURI, "circle");
    dot.setAttribute("class", "dot");
    dot.setAttribute("r", 3.5);
    panel.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * width;
      const y = ((event.clientY - box.top) / box.height) * height;
      const far = ([px, py]) => Math.hypot(3 * (px - x), py - y);
      const [px, py, label] = points.reduce((a, b) => (far(b) < far(a) ? b : a));
      dot.setAttribute("cx", px);
      dot.setAttribute("cy", py);
      svg.append(dot);
      tip.textContent = label;
      tip.hidden = false;
      const half = tip.offsetWidth / 2;
      tip.style.left = Math.min(Math.max((px / width) * box.width, half), box.width - half) + "px";
      tip.style.top = (py / height) * box.height - 8 + "px";
    });
    panel.addEventListener("pointerleave", () => {
      dot.remove();
      tip.hidden = true;
    });
  }

  // Traces: one at a time, chosen by stage, step and answer.
  const form = document.querySelector(".filters");
  if (!form) return;
  const traces = [...document.querySelectorAll(".trace")];
  const chips = document.querySelector(".chips");
  const icons = { right: "✓", wrong: "✗", unknown: "?" };
  let matching = [];
  let chosen = null;

  const element = (tag, name, ...inside) => {
    const made = document.createElement(tag);
    made.className = name;
    made.append(...inside);
    return made;
  };

  const show = (trace) => {
    chosen = trace;
    for (const other of traces) other.classList.toggle("chosen", other === trace);
    const place = matching.indexOf(trace);
    for (const [i, chip] of chips.querySelectorAll("button").entries()) chip.setAttribute("aria-pressed", i === place);
    form.querySelector("output").textContent = trace ? `${place + 1} of ${matching.length}` : "none";
    document.querySelector(".nothing").hidden = Boolean(trace);
  };

  const listSteps = () => {
    const steps = new Set(traces.filter((t) => t.dataset.stage === form.stage.value).map((t) => t.dataset.step));
    form.step.replaceChildren(new Option("all", ""), ...[...steps].map((step) => new Option(step, step)));
  };

  const filter = (wanted) => {
    matching = traces.filter(
      ({ dataset }) =>
        dataset.stage === form.stage.value &&
        (!form.step.value || dataset.step === form.step.value) &&
        (!form.verdict.value || dataset.verdict === form.verdict.value),
    );
    const groups = new Map();
    for (const trace of matching) {
      const { step, verdict } = trace.dataset;
      if (!groups.has(step)) groups.set(step, element("span", "step", element("span", "", `step ${step}`)));
      const chip = element("button", verdict, icons[verdict]);
      chip.type = "button";
      chip.title = `step ${step}, ${verdict}`;
      chip.addEventListener("click", () => show(trace));
      groups.get(step).append(chip);
    }
    chips.replaceChildren(...groups.values());
    const last = matching.at(-1);
    const start = matching.find((trace) => trace.dataset.step === last.dataset.step) ?? null;
    show(matching.includes(wanted) ? wanted : start);
  };

  const turn = (by) => {
    if (matching.length) show(matching[(matching.indexOf(chosen) + by + matching.length) % matching.length]);
  };

  form.addEventListener("submit", (event) => event.preventDefault());
  form.stage.addEventListener("change", () => (listSteps(), filter()));
  form.step.addEventListener("change", () => filter(chosen));
  form.verdict.addEventListener("change", () => filter(chosen));
  form.previous.addEventListener("click", () => turn(-1));
  form.next.addEventListener("click", () => turn(1));

  const linked = traces.find((trace) => "#" + trace.id === location.hash);
  if (linked) form.stage.value = linked.dataset.stage;
  listSteps();
  filter(linked);
})();
