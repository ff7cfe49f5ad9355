// Charts: SVG from the data under #data. Drag to zoom, double-click or Escape for all steps; charts of one kind
// zoom together. What the reader has switched off and zoomed to outlasts a refresh.
const SIZE = { height: 216, left: 50, right: 12, top: 20, bottom: 22 };
const FLOOR = 1e-9; // replaces 0 on a logarithmic axis
const zooms = new Map(); // kind -> [first, last] step on the axis
const off = new Set(); // "run 1", "Length: response"
let charts = [];
let resizing = null;

function startCharts() {
  const source = document.querySelector("#data");
  const figures = [...document.querySelectorAll(".panel")];
  resizing?.disconnect();
  if (!source) return;
  const page = JSON.parse(source.textContent);
  charts = figures.map((figure, i) => new Chart(figure, page.charts[i], page));
  resizing = new ResizeObserver((entries) => entries.forEach(({ target }) => target.chart.draw()));
  for (const chart of charts) resizing.observe(chart.plot);
  for (const button of document.querySelectorAll(".runs button")) {
    bindSwitch(button, `run ${button.dataset.run}`, () => charts.forEach((chart) => chart.draw()));
  }
}

function bindSwitch(button, name, changed) {
  button.setAttribute("aria-pressed", !off.has(name));
  button.addEventListener("click", () => {
    if (!off.delete(name)) off.add(name);
    button.setAttribute("aria-pressed", !off.has(name));
    changed();
  });
}

class Chart {
  constructor(figure, data, { runs, xs, stages }) {
    this.data = data;
    this.runs = runs;
    this.stages = stages[data.kind];
    this.lines = data.lines.map((line) => ({ ...line, x: xs[line.x] }));
    this.last = Math.max(1, ...this.stages.flat().map(([, , stop]) => stop));
    this.figure = figure;
    this.plot = figure.querySelector(".plot");
    this.plot.chart = this;
    this.svg = this.plot.querySelector("svg");
    this.tip = this.plot.querySelector(".reading-off");
    this.reset = figure.querySelector(".reset");
    this.reset.addEventListener("click", () => this.zoom(null));
    this.fillLegend();
    this.listen();
  }

  // A colour tells the run where there are several, else the line; the dashes then tell the line.
  look(run, label) {
    return this.runs.length > 1 ? `c${run % 8} d${label % 4}` : `c${label % 8}`;
  }

  fillLegend() {
    const legend = this.figure.querySelector(".legend");
    const several = this.runs.length > 1;
    if (this.data.labels.length > 1) {
      this.data.labels.forEach((label, i) => {
        const key = this.element("svg", { class: "key", viewBox: "0 0 18 6" }, null);
        this.element("path", { d: "M1 3h16", class: `curve ${several ? `ink d${i % 4}` : `c${i % 8}`}` }, key);
        const button = make("button", { type: "button" }, key, label);
        bindSwitch(button, `${this.data.title}: ${label}`, () => this.draw());
        legend.append(button);
      });
    }
    if (this.data.evals.length) legend.append(make("span", { class: `held-out ${several ? "ink" : "eval"}` }, "held-out"));
    legend.hidden = !legend.childNodes.length;
  }

  get window() {
    return zooms.get(this.data.kind) ?? [0, this.last];
  }

  get shown() {
    const { labels, title } = this.data;
    return this.lines.filter(({ run, label }) => !off.has(`run ${run}`) && !off.has(`${title}: ${labels[label]}`));
  }

  get evals() {
    const [low, high] = this.window;
    return this.data.evals.filter(({ run, x }) => !off.has(`run ${run}`) && x >= low && x <= high);
  }

  zoom(window) {
    if (window) zooms.set(this.data.kind, window);
    else zooms.delete(this.data.kind);
    for (const chart of charts) if (chart.data.kind === this.data.kind) chart.draw();
  }

  element(tag, attributes, parent, text) {
    const made = document.createElementNS(this.svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent?.append(made);
    return made;
  }

  // Sets this.toX and this.toY, from values to pixels of the plot.
  scale() {
    const width = this.plot.clientWidth;
    const { left, right, top, bottom, height } = SIZE;
    const [first, last] = this.window;
    const log = this.data.scale === "log";
    this.up = log ? (value) => Math.log10(Math.max(value, FLOOR)) : (value) => value;
    this.low = 0;
    this.high = 1;
    if (this.data.scale !== "share") {
      const seen = this.evals.flatMap(({ bounds }) => bounds);
      for (const line of this.shown) {
        line.x.forEach((x, i) => {
          if (x >= first && x <= last) seen.push(line.y[i], line.low?.[i], line.high?.[i]);
        });
      }
      if (log) seen.push(this.data.rounding / 4, this.data.rounding * 10);
      const values = seen.filter((value) => value !== null && value !== undefined).map(this.up);
      if (values.length) [this.low, this.high] = [Math.min(...values), Math.max(...values)];
      const margin = 0.06 * (this.high - this.low) || Math.abs(this.high) / 10 || 1;
      // A quantity that is never negative has no axis below 0.
      this.low = this.low >= 0 && !log ? Math.max(0, this.low - margin) : this.low - margin;
      this.high += margin;
    }
    this.inner = { width: width - left - right, height: height - top - bottom };
    this.toX = (x) => left + ((x - first) / (last - first)) * this.inner.width;
    this.toStep = (px) => first + ((px - left) / this.inner.width) * (last - first);
    this.toY = (value) => top + (1 - (this.up(value) - this.low) / (this.high - this.low)) * this.inner.height;
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    this.scale();
    this.reset.hidden = !zooms.has(this.data.kind);
    this.hideReading();
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${SIZE.height}`);
    this.drawAxes(width);
    const { left, top } = SIZE;
    const box = { x: left, y: top - 4, width: this.inner.width + 6, height: this.inner.height + 8 };
    // An inner svg clips; its viewBox keeps the coordinates of the outer one.
    const inside = this.element("svg", { ...box, viewBox: Object.values(box).join(" ") }, this.svg);
    for (const line of this.shown) this.drawLine(line, inside);
    for (const point of this.evals) this.drawEval(point);
  }

  drawAxes(width) {
    const { left, right, top, bottom, height } = SIZE;
    const [first, last] = this.window;
    const base = height - bottom;
    const { scale, rounding } = this.data;
    const found = scale === "log" ? logTicks(this.low, this.high) : ticks(this.low, this.high, 5);
    for (const [value, text] of found) {
      const y = top + (1 - (value - this.low) / (this.high - this.low)) * this.inner.height;
      this.element("path", { d: `M${left} ${y}H${width - right}`, class: "grid" }, this.svg);
      const words = scale === "share" ? `${Math.round(100 * value)} %` : text;
      this.element("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, this.svg, words);
    }
    for (const [step, text] of ticks(first, last, Math.max(2, Math.min(6, width / 70)), 1)) {
      const x = this.toX(step);
      this.element("path", { d: `M${x} ${base}v4`, class: "tick" }, this.svg);
      this.element("text", { x, y: base + 17, "text-anchor": "middle" }, this.svg, text);
    }
    this.element("path", { d: `M${left} ${base}H${width - right}`, class: "tick" }, this.svg);
    if (rounding) {
      const y = this.toY(rounding);
      this.element("path", { d: `M${left} ${y}H${width - right}`, class: "limit" }, this.svg);
      this.element("text", { x: width - right, y: y - 4, "text-anchor": "end" }, this.svg, "rounding");
    }
    this.markStages(width);
  }

  // Names and ends of the stages, where all runs have the same ones.
  markStages(width) {
    if (new Set(this.stages.filter((own) => own.length).map((own) => JSON.stringify(own))).size !== 1) return;
    const [first, last] = this.window;
    for (const [name, start, stop] of this.stages.find((own) => own.length)) {
      const [from, to] = [Math.max(start, first), Math.min(stop, last)];
      if (from >= to) continue;
      const x = this.toX(from);
      const gap = start > first ? 4 : 0; // behind the rule
      const room = Math.floor((this.toX(to) - x - gap) / 6.2);
      if (start > first) this.element("path", { d: `M${x} ${SIZE.top}V${SIZE.height - SIZE.bottom}`, class: "stage" }, this.svg);
      const text = name.length <= room ? name : `${name.slice(0, room - 1)}…`;
      if (room >= 4) this.element("text", { x: x + gap, y: SIZE.top - 8 }, this.svg, text);
    }
  }

  drawLine(line, inside) {
    const look = this.look(line.run, line.label);
    if (line.low) {
      const ends = line.x.map((x, i) => `${this.toX(x)} ${this.toY(line.high[i])}`);
      const back = line.x.map((x, i) => `${this.toX(x)} ${this.toY(line.low[i])}`).reverse();
      this.element("path", { d: `M${[...ends, ...back].join("L")}Z`, class: `band ${look}` }, inside);
      for (const [i, x] of line.x.entries()) {
        this.element("circle", { cx: this.toX(x), cy: this.toY(line.y[i]), r: 2.5, class: `spot ${look}` }, inside);
      }
    }
    const lone = line.y.filter((y) => y !== null).length === 1 ? " lone" : "";
    const thin = line.smooth ? " thin" : "";
    this.element("path", { d: this.path(line.x, line.y), class: `curve ${look}${thin}${lone}` }, inside);
    if (line.smooth) this.element("path", { d: this.path(line.x, line.smooth), class: `curve ${look}` }, inside);
  }

  path(xs, ys) {
    let drawn = "";
    let joined = false;
    xs.forEach((x, i) => {
      if (ys[i] !== null) {
        const place = `${this.toX(x).toFixed(1)} ${this.toY(ys[i]).toFixed(1)}`;
        drawn += joined ? `L${place}` : `M${place}h0`; // h0: a point alone is a dot
      }
      joined = ys[i] !== null;
    });
    return drawn;
  }

  drawEval({ run, x, bounds: [low, value, high] }) {
    const look = this.runs.length > 1 ? `c${run % 8}` : "eval";
    const [px, top, py, bottom] = [this.toX(x), this.toY(high), this.toY(value), this.toY(low)];
    const bars = high > low ? `M${px} ${top}V${bottom}M${px - 3} ${top}h6M${px - 3} ${bottom}h6` : "";
    this.element("path", { d: bars, class: `bars ${look}` }, this.svg);
    this.element("path", { d: `M${px} ${py - 5}l5 5l-5 5l-5 -5z`, class: `diamond ${look}` }, this.svg);
  }

  listen() {
    let from = null;
    const place = (event) => {
      const px = event.clientX - this.plot.getBoundingClientRect().left;
      return Math.min(Math.max(px, SIZE.left), SIZE.left + this.inner.width);
    };
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      from = place(event);
      this.plot.setPointerCapture(event.pointerId);
      this.readOff(from); // a tap moves nothing
    });
    this.plot.addEventListener("pointermove", (event) => {
      const at = place(event);
      this.readOff(at);
      if (from === null || Math.abs(at - from) < 5) return;
      const box = { x: Math.min(from, at), y: SIZE.top, width: Math.abs(at - from), height: this.inner.height };
      this.element("rect", { ...box, class: "selection reading" }, this.svg);
    });
    this.plot.addEventListener("pointerup", (event) => {
      const [low, high] = [from ?? 0, place(event)].sort((a, b) => a - b).map(this.toStep);
      const wide = from !== null && Math.abs(place(event) - from) >= 5 && high - low >= 1;
      from = null;
      if (wide) this.zoom([Math.floor(low), Math.ceil(high)]);
    });
    this.plot.addEventListener("pointercancel", () => (from = null));
    this.plot.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch") this.hideReading();
    });
    this.plot.addEventListener("dblclick", () => this.zoom(null));
  }

  hideReading() {
    this.tip.hidden = true;
    for (const mark of this.svg.querySelectorAll(".reading")) mark.remove();
  }

  // Shows the values at the step that is nearest to a place, of every line that has one there.
  readOff(px) {
    this.hideReading();
    const [first, last] = this.window;
    const points = this.shown.flatMap((line) => {
      const near = nearest(line, this.toStep(px), first, last);
      return near === null ? [] : [{ line, x: line.x[near], y: line.y[near] }];
    });
    const evals = this.evals.filter(({ x }) => Math.abs(this.toX(x) - px) < 8);
    if (!points.length && !evals.length) return;
    const distance = ({ x }) => Math.abs(this.toX(x) - px);
    const closest = [...points, ...evals].reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const read = this.data.scale === "share" ? (y) => `${(100 * y).toFixed(1)} %` : number;
    const rows = points
      .filter(({ x }) => Math.abs(this.toX(x) - this.toX(closest.x)) <= 3)
      .map(({ line, x, y }) => {
        this.element("circle", { cx: this.toX(x), cy: this.toY(y), r: 3.5, class: `spot reading ${this.look(line.run, line.label)}` }, this.svg);
        const names = [this.runs.length > 1 && this.runs[line.run], this.data.labels.length > 1 && this.data.labels[line.label]];
        const bounds = line.low ? ` [${read(line.low[line.x.indexOf(x)])}, ${read(line.high[line.x.indexOf(x)])}]` : "";
        return this.row(this.look(line.run, line.label), names.filter(Boolean).join(", "), read(y) + bounds);
      });
    for (const { run, label, bounds: [low, value, high] } of evals) {
      const name = `${this.runs.length > 1 ? `${this.runs[run]}, ` : ""}held-out after ${label}`;
      const bounds = high > low ? ` [${read(low)}, ${read(high)}]` : "";
      rows.push(this.row(this.runs.length > 1 ? `c${run % 8}` : "eval", name, read(value) + bounds));
    }
    const x = this.toX(closest.x);
    this.element("path", { d: `M${x} ${SIZE.top}V${SIZE.height - SIZE.bottom}`, class: "cross reading" }, this.svg);
    this.tip.replaceChildren(make("p", {}, this.stepName(closest)), ...rows);
    this.tip.hidden = false;
    const room = this.plot.clientWidth - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(x < room ? x + 12 : x - this.tip.offsetWidth - 12, room))}px`;
  }

  row(look, name, value) {
    return make("p", {}, make("i", { class: look }), ...(name ? [`${name} `] : []), make("b", {}, value));
  }

  stepName({ line, run, x }) {
    const own = this.stages[line?.run ?? run];
    const [stage, start] = own.find(([, start, stop]) => x > start && x <= stop) ?? own[0];
    return `${stage}, step ${(x - start).toLocaleString("en-US")}`;
  }
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !zooms.size) return;
  zooms.clear();
  charts.forEach((chart) => chart.draw());
});
