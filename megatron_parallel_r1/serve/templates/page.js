// Asks the server as any OpenAI client does, and shows what `parallel` tells of each path as it grows.
// What the model writes only ever becomes text nodes.

const form = document.querySelector("form");
const thought = document.querySelector("#thought");
const status = document.querySelector("#status");
let asking = null;

function element(kind, name, ...inside) {
  const made = document.createElement(kind);
  made.className = name;
  made.append(...inside);
  return made;
}

// One response on the page. `at` is a place as docs/serving.md has it: [] the main text, [1] the summary of its
// first block, [1, 0] that block's first path, and so on inside paths.
class View {
  constructor(root) {
    this.chains = new Map([["", root]]);
    this.blocks = new Map();
    this.summaries = new Map();
    root.replaceChildren();
    root.classList.remove("done");
  }

  hear({ at, part, text, closed }) {
    const voice = part === "summary" ? this.summary(at) : this.chain(at);
    this.say(voice, text);
    if (closed) voice.classList.remove("open");
  }

  say(voice, text) {
    let last = voice.lastElementChild;
    if (!last?.classList.contains("text")) {
      last = element("p", "text");
      voice.append(last);
    }
    const words = last.firstChild ? text : text.trimStart();
    if (!words) return;
    if (last.firstChild) last.firstChild.appendData(words);
    else last.append(document.createTextNode(words));
  }

  chain(at) {
    if (!this.chains.has(at.join())) {
      const path = element("div", "path open", element("p", "name", `Path ${at.at(-1) + 1}`));
      this.block(at.slice(0, -1)).querySelector(".paths").append(path);
      this.chains.set(at.join(), path);
    }
    return this.chains.get(at.join());
  }

  block(at) {
    if (!this.blocks.has(at.join())) {
      const block = element("div", "block", element("div", "paths"));
      this.chain(at.slice(0, -1)).append(block);
      this.blocks.set(at.join(), block);
    }
    return this.blocks.get(at.join());
  }

  summary(at) {
    if (!this.summaries.has(at.join())) {
      const summary = element("div", "summary open", element("p", "name", "Summary"));
      this.block(at).append(summary);
      this.summaries.set(at.join(), summary);
    }
    return this.summaries.get(at.join());
  }

  end(complete) {
    for (const open of thought.querySelectorAll(".open")) open.classList.replace("open", "cut");
    if (complete) thought.classList.add("done");
  }
}

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

async function think() {
  asking = new AbortController();
  const view = new View(thought);
  const start = performance.now();
  let reason = null;
  let usage = null;
  tell("Waiting for its turn …");
  try {
    const response = await fetch("v1/chat/completions", request());
    if (!response.ok) throw new Error((await response.json()).error.message);
    tell("Thinking …");
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) {
        for (const delta of choice.parallel?.deltas ?? []) view.hear(delta);
        reason = choice.finish_reason ?? reason;
      }
    }
    if (!reason) throw new Error("the connection broke off");
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    const critical = usage.completion_tokens_details.critical_path_tokens;
    tell(`${reason === "length" ? "Cut short" : "Done"} · ${usage.completion_tokens} tokens, `
      + `${critical} of them one behind the other · ${seconds} s`);
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
