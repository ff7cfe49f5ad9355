// A watched run: asks the server for a newer page and takes over its sections; zoom and choices stay.
const PAUSE_MS = 3000;
let version = null;

async function refresh() {
  const live = document.querySelector("#live");
  try {
    const response = await fetch("/", { cache: "no-store", headers: version ? { "If-None-Match": version } : {} });
    if (response.status === 200) {
      takeOver(new DOMParser().parseFromString(await response.text(), "text/html"));
      version = response.headers.get("ETag");
    }
    const bad = response.status === 200 || response.status === 304 ? "" : `: ${await response.text()}`;
    live.textContent = bad ? `waiting${bad}` : "live";
    live.className = bad ? "lost" : "";
  } catch {
    live.textContent = "the server has ended";
    live.className = "lost";
  }
  setTimeout(refresh, PAUSE_MS);
}

function takeOver(fresh) {
  const form = document.querySelector(".filters");
  const choices = form ? new Map([...new FormData(form)]) : new Map();
  const trace = document.querySelector(".trace.chosen")?.dataset.key;
  for (const id of ["evaluation", "curves", "traces"]) {
    document.getElementById(id).replaceWith(fresh.getElementById(id));
  }
  const [old, now] = [document, fresh].map((page) => page.querySelectorAll("#top > :not(.product)"));
  old.forEach((element) => element.remove());
  document.querySelector("#top").append(...now);
  startCharts();
  startTraces(choices, trace);
}

setTimeout(refresh, PAUSE_MS);
