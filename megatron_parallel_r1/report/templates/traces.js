// Traces: one at a time, chosen by stage, step and kind. A link to #trace-3 opens that one.
const ICONS = { right: "✓", wrong: "✗", unknown: "?" };

// `choices` are the form's values before a refresh, `key` names the trace that was open.
function startTraces(choices = new Map(), key = null) {
  const form = document.querySelector(".filters");
  if (!form) return;
  const traces = [...document.querySelectorAll(".trace")];
  const chips = document.querySelector(".chips");
  let matching = [];
  let chosen = null;

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

  const isKind = ({ dataset }, kind) => (kind === "malformed" ? "malformed" in dataset : !kind || dataset.verdict === kind);

  const listChips = (byLength) => {
    const groups = new Map();
    for (const trace of matching) {
      const { step, verdict } = trace.dataset;
      const name = byLength ? "longest" : `step ${step}`;
      if (!groups.has(name)) groups.set(name, [make("span", {}, name)]);
      const malformed = "malformed" in trace.dataset ? ", malformed" : "";
      const words = { type: "button", class: verdict, title: `step ${step}, ${verdict}${malformed}` };
      const chip = make("button", words, ICONS[verdict] + (malformed && "!"));
      chip.addEventListener("click", () => show(trace));
      groups.get(name).push(chip);
    }
    chips.replaceChildren(...[...groups.values()].map((group) => make("span", { class: "step" }, ...group)));
  };

  const filter = (wanted) => {
    const { stage, step, kind, order } = Object.fromEntries(new FormData(form));
    matching = traces.filter(
      (trace) => trace.dataset.stage === stage && (!step || trace.dataset.step === step) && isKind(trace, kind),
    );
    if (order) matching.sort((a, b) => b.dataset.length - a.dataset.length);
    listChips(Boolean(order));
    const last = matching.at(-1);
    const first = order ? matching[0] : matching.find((trace) => trace.dataset.step === last.dataset.step);
    show(matching.includes(wanted) ? wanted : (first ?? null));
  };

  const turn = (by) => {
    if (matching.length) show(matching[(matching.indexOf(chosen) + by + matching.length) % matching.length]);
  };

  const view = () => form.closest("section").classList.toggle("tree", form.view.value === "tree");

  form.addEventListener("submit", (event) => event.preventDefault());
  form.stage.addEventListener("change", () => (listSteps(), filter()));
  form.step.addEventListener("change", () => filter(chosen));
  form.kind.addEventListener("change", () => filter(chosen));
  form.order.addEventListener("change", () => filter());
  form.view.addEventListener("change", view);
  form.previous.addEventListener("click", () => turn(-1));
  form.next.addEventListener("click", () => turn(1));

  const linked = traces.find((trace) => (key ? trace.dataset.key === key : `#${trace.id}` === location.hash));
  if (!choices.size && matchMedia("(max-width: 640px)").matches) form.view.value = "tree";
  if (choices.has("stage")) form.stage.value = choices.get("stage");
  if (linked) form.stage.value = linked.dataset.stage;
  listSteps();
  for (const [name, value] of choices) if (form[name]) form[name].value = value;
  for (const select of form.querySelectorAll("select")) if (select.selectedIndex < 0) select.selectedIndex = 0;
  view();
  filter(linked);
}
