// Numbers, the ticks of an axis, and the point nearest to a place.
function make(tag, attributes, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...inside);
  return made;
}

// As utils/formats.py writes numbers.
function number(value) {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e7)) return value.toExponential(1).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

function ticks(low, high, most, smallest = 0) {
  const wanted = Math.max((high - low) / most, smallest);
  const power = 10 ** Math.floor(Math.log10(wanted));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= wanted * 0.999);
  const first = Math.ceil(low / step - 1e-6);
  const count = Math.floor(high / step + 1e-6) - first + 1;
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const small = digits > 3 && Math.max(-low, high) < 5e-3;
  return Array.from({ length: Math.max(0, count) }, (_, i) => {
    const value = (first + i) * step;
    const plain = { minimumFractionDigits: digits, maximumFractionDigits: digits };
    return [value, small && value ? value.toExponential(1).replace(".0e", "e") : value.toLocaleString("en-US", plain)];
  });
}

function logTicks(low, high) {
  const [first, last] = [Math.ceil(low), Math.floor(high)];
  const step = Math.max(1, Math.ceil((last - first) / 5));
  const powers = Array.from({ length: Math.floor(Math.max(0, last - first) / step) + 1 }, (_, i) => first + i * step);
  return powers.map((power) => [power, `1e${power}`]);
}

// The index of the line's value nearest to a step; null where it has none between first and last.
function nearest({ x, y }, step, first, last) {
  let best = null;
  for (let i = 0; i < x.length; i++) {
    if (y[i] === null || x[i] < first || x[i] > last) continue;
    if (best === null || Math.abs(x[i] - step) < Math.abs(x[best] - step)) best = i;
  }
  return best;
}
