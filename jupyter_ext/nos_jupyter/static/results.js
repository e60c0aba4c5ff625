// @ts-check
// Results by type, as `nos_jupyter.rendering` describes them.

import { make } from "./page.js";

const MAX_BARS = 12;

/** Draws a value, in place of what was there. @param {HTMLElement} place @param {any} view @param {DataView | undefined} data */
export function showResult(place, view, data) {
  if (view.kind === "text" && place.firstElementChild?.className === "nos-text") {
    place.firstElementChild.textContent = view.text;
    return;
  }
  if (view.kind === "scores" && /** @type {any} */ (place.firstElementChild)?.update?.(view)) return;
  release(place);
  place.replaceChildren(draw(view, data));
}

/** Adds an item of a generator: text is appended to the text before. @param {HTMLElement} place @param {any} view @param {DataView | undefined} data */
export function addItem(place, view, data) {
  const last = place.lastElementChild;
  if (view.kind === "text" && last?.className === "nos-text") last.textContent += view.text;
  else place.append(draw(view, data));
  place.scrollTop = place.scrollHeight;
}

/** Gives back what pictures hold. @param {HTMLElement} place */
export function release(place) {
  place.querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
}

/** @param {any} view @param {DataView | undefined} data @returns {HTMLElement} */
function draw(view, data) {
  if (view.kind === "image") return drawFile(view, data);
  if (view.kind === "pixels") return drawPixels(make("canvas", "nos-picture"), view.shape, bytesOf(data));
  if (view.kind === "scores") return drawScores(view);
  if (view.kind === "table") return drawTable(view);
  if (view.kind === "text") return make("div", "nos-text", view.text);
  const box = make("div", "nos-array");
  if (view.title) box.append(make("div", "nos-faint", view.title));
  box.append(make("pre", "", view.text));
  return box;
}

/** @param {DataView | undefined} data */
function bytesOf(data) {
  return data ? new Uint8Array(data.buffer, data.byteOffset, data.byteLength) : new Uint8Array();
}

/** @param {any} view @param {DataView | undefined} data */
function drawFile(view, data) {
  const image = make("img", "nos-picture");
  image.alt = "result";
  image.src = URL.createObjectURL(new Blob([bytesOf(data)], { type: view.mime_type }));
  return image;
}

/** Draws rows of pixels of 1, 3 or 4 channels. @param {HTMLCanvasElement} canvas @param {number[]} shape @param {Uint8Array} bytes */
export function drawPixels(canvas, shape, bytes) {
  const [height, width, channels = 1] = shape;
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const image = new ImageData(width, height);
  const words = new Uint32Array(image.data.buffer);
  if (channels === 1) for (let at = 0; at < words.length; at++) words[at] = 0xff000000 | (bytes[at] * 0x10101);
  else if (channels === 4) image.data.set(bytes);
  else for (let at = 0, from = 0; at < words.length; at++, from += 3) words[at] = 0xff000000 | (bytes[from + 2] << 16) | (bytes[from + 1] << 8) | bytes[from];
  canvas.getContext("2d")?.putImageData(image, 0, 0);
  return canvas;
}

/** Bars, in the order of the classes; where there are many, the largest first. @param {{labels: string[], values: number[]}} view */
function drawScores(view) {
  const chart = make("div", "nos-scores");
  chart.setAttribute("role", "img");
  const isShort = view.labels.length <= MAX_BARS;
  const rows = view.labels.slice(0, MAX_BARS).map(() => {
    const row = make("div", "nos-score");
    const bar = make("span", "nos-bar-track");
    const parts = { label: make("span", "nos-score-label"), fill: make("span", "nos-bar-fill"), value: make("span", "nos-faint nos-score-value") };
    bar.append(parts.fill);
    row.append(parts.label, bar, parts.value);
    chart.append(row);
    return { row, ...parts };
  });
  const count = view.labels.length;
  chart.update = (/** @type {{labels: string[], values: number[]}} */ { labels, values }) => {
    if (labels.length !== count) return false;
    const ranked = labels.map((_, at) => at).sort((one, other) => values[other] - values[one]);
    const scale = Math.max(1, ...values.map(Math.abs));
    (isShort ? labels.map((_, at) => at) : ranked.slice(0, MAX_BARS)).forEach((at, place) => {
      rows[place].label.textContent = labels[at];
      rows[place].fill.style.width = `${(Math.max(0, values[at]) / scale) * 100}%`;
      rows[place].value.textContent = values[at].toFixed(3);
      rows[place].row.classList.toggle("nos-best", at === ranked[0]);
    });
    chart.dataset.best = labels[ranked[0]];
    chart.setAttribute("aria-label", `Scores of ${count} classes; the best is ${labels[ranked[0]]}, ${values[ranked[0]].toFixed(3)}`);
    return true;
  };
  chart.update(view);
  return chart;
}

/** @param {{header: string[], rows: string[][]}} view */
function drawTable(view) {
  const table = make("table", "nos-table");
  const head = table.createTHead().insertRow();
  for (const name of view.header) head.append(make("th", "", name));
  const body = table.createTBody();
  for (const cells of view.rows) {
    const row = body.insertRow();
    for (const cell of cells) row.append(make("td", "", cell));
  }
  return table;
}
