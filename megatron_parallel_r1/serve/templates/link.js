// A trace in the address of the page, after its #: compressed JSON, which no server sees or keeps.
const PREFIX = "#trace=";
const MOST_CHARACTERS = 2_000_000;

async function through(stream, bytes) {
  return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(stream)).arrayBuffer());
}

async function packed(trace) {
  const bytes = await through(new CompressionStream("deflate-raw"), new TextEncoder().encode(JSON.stringify(trace)));
  const binary = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return PREFIX + btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

// The trace of an address; throws where it is damaged.
async function unpacked(hash) {
  const binary = atob(hash.slice(PREFIX.length).replaceAll("-", "+").replaceAll("_", "/"));
  const reader = new Blob([Uint8Array.from(binary, (c) => c.charCodeAt(0))]).stream()
    .pipeThrough(new DecompressionStream("deflate-raw")).pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
    text += value;
    if (text.length > MOST_CHARACTERS) throw new Error("it is too long");
  }
  const trace = JSON.parse(text);
  const counts = [trace.tokens, trace.critical, trace.paths];
  const isPlace = (at) => Array.isArray(at) && at.length < 20 && at.every((n) => Number.isInteger(n) && n >= 0);
  const isDelta = ({ at, text, answer }) => isPlace(at) && typeof text === "string" && typeof (answer ?? "") === "string";
  if (typeof trace.problem !== "string" || !counts.every((n) => Number.isInteger(n ?? 0)) || !trace.deltas.every(isDelta)) {
    throw new Error("it is no trace");
  }
  return trace;
}
