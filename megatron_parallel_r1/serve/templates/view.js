// One response on the page. What the model writes only ever becomes text nodes.

function element(kind, name, ...inside) {
  const made = document.createElement(kind);
  made.className = name;
  made.append(...inside);
  return made;
}

// `at` is a place as docs/serving.md has it: [] the main text, [1] the summary of its first block, [1, 0] that
// block's first path, and so on inside paths. `record` has each text once, in an order that `hear` can replay.
class View {
  constructor(root) {
    this.root = root;
    this.chains = new Map([["", root]]);
    this.blocks = new Map();
    this.summaries = new Map();
    this.record = new Map();
    root.replaceChildren();
    root.classList.remove("done");
  }

  hear({ at, part, text, closed, answer }) {
    const voice = part === "summary" ? this.summary(at) : this.chain(at);
    this.say(voice, text);
    if (closed) voice.classList.remove("open");
    if (answer) this.conclude(at, answer);
    const blocks = voice.querySelectorAll(":scope > .block").length;
    const key = `${part} ${at} ${blocks}`;
    const before = this.record.get(key) ?? { at, part, text: "" };
    const more = { ...(closed && { closed }), ...(answer && { answer }) };
    this.record.set(key, { ...before, text: before.text + text, ...more });
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

  // A path's own answer, and how many paths of its block agree with it.
  conclude(at, answer) {
    const block = this.block(at.slice(0, -1));
    this.chain(at).querySelector(":scope > .name").append(element("span", "answer", answer));
    const answers = [...block.querySelectorAll(":scope > .paths > .path > .name > .answer")];
    for (const each of answers) {
      const same = answers.filter(({ textContent }) => textContent === each.textContent).length;
      each.title = `${same} of ${answers.length} answers in this block`;
      each.classList.toggle("agreed", same > 1);
    }
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
    for (const open of this.root.querySelectorAll(".open")) open.classList.replace("open", "cut");
    if (complete) this.root.classList.add("done");
  }
}
