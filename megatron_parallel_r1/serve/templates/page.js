// Asks the server as any OpenAI client does, and shows what `parallel` tells of each path as it grows.

const form = document.querySelector("form");
const thought = document.querySelector("#thought");
const status = document.querySelector("#status");
const size = document.querySelector("#size");
let asking = null;
let shown = null; // the trace that a link would hold

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice("data: ".length));
    }
  }
}

function request() {
  const body = {
    messages: [{ role: "user", content: form.problem.value.trim() }],
    stream: true,
    stream_options: { include_usage: true },
    parallel: form.paths.disabled ? {} : { paths: form.paths.valueAsNumber },
  };
  if (form.seed.value) body.seed = form.seed.valueAsNumber;
  const headers = { "Content-Type": "application/json" };
  if (form.key.value) headers.Authorization = `Bearer ${form.key.value}`;
  return { method: "POST", headers, body: JSON.stringify(body), signal: asking.signal };
}

function tell(text, bad = false) {
  status.textContent = text;
  status.classList.toggle("bad", bad);
}

function warn(texts) {
  const list = document.querySelector("#warnings");
  list.append(...texts.map((text) => element("li", "", text)));
  list.hidden = !list.childNodes.length;
}

function clear() {
  document.querySelector("#warnings").replaceChildren();
  warn([]);
  size.hidden = true;
}

// Two bars: all tokens, and those that had to be generated one after another.
function showSize({ tokens, critical }) {
  for (const [name, count] of [["total", tokens], ["critical", critical]]) {
    size.querySelector(`.${name} i`).style.width = `${(100 * count) / Math.max(1, tokens)}%`;
    size.querySelector(`.${name} b`).textContent = count.toLocaleString("en-US");
  }
  const times = (tokens / Math.max(1, critical)).toFixed(1);
  size.querySelector(".note").textContent = critical < tokens ? `${times} times fewer steps than in one chain` : "";
  size.querySelector(".link").textContent = "Copy a link to this trace";
  size.hidden = false;
}

async function share() {
  const hash = await packed(shown);
  history.replaceState(null, "", hash);
  const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
  size.querySelector(".link").textContent = copied ? "Copied" : "The address bar has the link now";
}

// Shows the trace of the page's own address.
async function openLink(hash) {
  if (!hash.startsWith(PREFIX) || asking !== null) return;
  clear();
  try {
    shown = await unpacked(hash);
    const view = new View(thought);
    for (const delta of shown.deltas) view.hear(delta);
    view.end(shown.complete);
    form.problem.value = shown.problem;
    if (shown.paths && !form.paths.disabled) form.paths.value = shown.paths;
    form.seed.value = shown.seed ?? "";
    tell(`From a link: a trace of ${shown.model}. Think runs it again here.`);
    showSize(shown);
  } catch (error) {
    tell(`The link is damaged: ${error.message}`, true);
  }
}

async function think() {
  asking = new AbortController();
  const view = new View(thought);
  const start = performance.now();
  let reason = null;
  let usage = null;
  const { problem, paths, seed } = form;
  const posed = {
    problem: problem.value.trim(),
    ...(!paths.disabled && { paths: paths.valueAsNumber }),
    ...(seed.value && { seed: seed.value }),
  };
  shown = null;
  clear();
  history.replaceState(null, "", location.pathname + location.search);
  tell("Waiting for its turn …");
  try {
    const response = await fetch("v1/chat/completions", request());
    if (!response.ok) throw new Error((await response.json()).error.message);
    tell("Thinking …");
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      warn(chunk.warnings ?? []);
      for (const choice of chunk.choices) {
        for (const delta of choice.parallel?.deltas ?? []) view.hear(delta);
        reason = choice.finish_reason ?? reason;
      }
    }
    if (!reason) throw new Error("the connection broke off");
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    shown = {
      ...posed,
      model: document.querySelector("h1").textContent,
      tokens: usage.completion_tokens,
      critical: usage.completion_tokens_details.critical_path_tokens,
      complete: reason === "stop",
      deltas: [...view.record.values()],
    };
    tell(`${shown.complete ? "Done" : "Cut short"} · ${shown.tokens} tokens, `
      + `${shown.critical} of them one after another · ${seconds} s`);
    showSize(shown);
  } catch (error) {
    if (error.name === "AbortError") tell("Stopped.");
    else tell(`It did not work: ${error.message}`, true);
  }
  view.end(reason === "stop");
  asking = null;
}

function show() {
  form.querySelector("[type=submit]").hidden = asking !== null;
  form.stop.hidden = asking === null;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (asking !== null) return;
  const done = think();
  show();
  await done;
  show();
  const needsKey = !form.key.closest("label").hidden && !form.key.value;
  (needsKey ? form.key : form.problem).focus();
});
form.problem.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
form.stop.addEventListener("click", () => asking?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") asking?.abort();
});
for (const example of document.querySelectorAll(".examples button")) {
  example.addEventListener("click", () => {
    form.problem.value = example.textContent;
    form.requestSubmit();
  });
}
size.querySelector(".link").addEventListener("click", share);
window.addEventListener("hashchange", () => openLink(location.hash));
openLink(location.hash);
