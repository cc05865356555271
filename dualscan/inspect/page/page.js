"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const MEAN = -1;
const VIEW_NAMES = { operator: "operator", unified: "unified (with convolution, gate, norm)" };
const KIND_NAMES = { mamba2: "Mamba-2", mamba: "Mamba", attention: "attention", parallel: "Mamba-2 and attention", shared: "Mamba-2" };
const length = data.tokens.length;
// What is chosen; everything drawn follows from it. `row` and `column` are tokens; `column` is null until one is pointed at.
const chosen = { view: data.views[0], layer: 0, head: MEAN, scale: "row", strip: "rollout", row: length - 1, column: null };

/* Matrices: int8 codes, the signed square root of entry / largest of the row, times 127; and each row's largest. Both are
   deflated and in base64. */

async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const parts = [];
  const reader = stream.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) parts.push(part.value);
  return new Blob(parts).arrayBuffer();
}

const unpacked = new Map();
function unpack(holder) {
  if (!unpacked.has(holder)) {
    const both = Promise.all([inflate(holder.codes), inflate(holder.scales)]);
    unpacked.set(holder, both.then(([codes, scales]) => ({ codes: new Int8Array(codes), scales: new Float32Array(scales) })));
  }
  return unpacked.get(holder);
}

const half = (cells) => (cells * (cells + 1)) / 2;

/* A causal matrix whose codes and rows' scales begin at `start` and `first`. `share` is an entry's signed square root,
   relative to the largest of its row or of the matrix. */
function triangle({ codes, scales }, start, first, cells, block) {
  const values = codes.subarray(start, start + half(cells));
  const rows = scales.subarray(first, first + cells);
  const largest = rows.reduce((a, b) => Math.max(a, b), 0);
  const code = (i, j) => (j > i ? 0 : values[half(i) + j]);
  const value = (i, j) => rows[i] * Math.sign(code(i, j)) * (code(i, j) / 127) ** 2;
  const share = (i, j, byRow) => (code(i, j) / 127) * (byRow || !largest ? 1 : Math.sqrt(rows[i] / largest));
  return { cells, block, largest, value, share };
}

async function matrixOf(layer, head, view) {
  const { meanCells, meanBlock, mapCells, mapBlock } = data;
  const all = await unpack(data.layers[layer].maps[view]);
  if (head === MEAN) return triangle(all, 0, 0, meanCells, meanBlock);
  return triangle(all, half(meanCells) + head * half(mapCells), meanCells + head * mapCells, mapCells, mapBlock);
}

async function rolloutOf(view) {
  return triangle(await unpack(data.rollout[view]), 0, 0, data.meanCells, data.meanBlock);
}

/* Colours come from the style sheet, so that they follow the system's light or dark. */

let palette;
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => style.getPropertyValue(name).trim().split(/\s+/).map(Number);
  const text = (name) => style.getPropertyValue(name).trim();
  palette = {
    zero: rgb("--zero"), more: [rgb("--more-mid"), rgb("--more")], less: [rgb("--less-mid"), rgb("--less")],
    future: rgb("--future"), glow: rgb("--glow"), ink: text("--ink"), quiet: text("--quiet"), accent: text("--accent"),
  };
}

const mix = (from, to, t) => from.map((c, k) => Math.round(c + (to[k] - c) * t));
function shade(t) {
  const [middle, end] = t < 0 ? palette.less : palette.more;
  const size = Math.min(Math.abs(t), 1);
  return size < 0.5 ? mix(palette.zero, middle, 2 * size) : mix(middle, end, 2 * size - 1);
}

/* Words. */

const visible = (token) => token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
function span(cell, block) {
  const last = Math.min((cell + 1) * block, length) - 1;
  const words = data.tokens.slice(cell * block, last + 1).map(visible).join("");
  return last === cell * block ? `“${words}” (${last})` : `“${words}” (${cell * block} to ${last})`;
}
function number(x) {
  if (x === null) return "∞";
  const small = x !== 0 && Math.abs(x) < 0.001;
  const text = small ? x.toExponential(1) : Math.abs(x) >= 100 ? Math.round(x).toString() : Number(x.toPrecision(3)).toString();
  return text.replace(/-/g, "−");
}
const layerName = (layer) => `layer ${data.layers[layer].index}, ${KIND_NAMES[data.layers[layer].kind]}`;
const headName = (head) => (head === MEAN ? "mean over the heads" : `head ${head}`);

/* Canvases. */

function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.font = "11px system-ui, sans-serif";
  context.imageSmoothingEnabled = false;
  return context;
}

function picture(rows, columns, colour) {
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = rows;
  const image = new ImageData(columns, rows);
  for (let i = 0, at = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++, at += 4) {
      image.data.set(colour(i, j), at);
      image.data[at + 3] = 255;
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function mapPicture(matrix, byRow) {
  return picture(matrix.cells, matrix.cells, (i, j) => (j > i ? palette.future : shade(matrix.share(i, j, byRow))));
}

/* The map. */

let shown = null;
// Room for the tokens left of the map and below it, and above it for half a line.
const [MARGIN, TOP] = [74, 7];

async function drawMap() {
  const wanted = { ...chosen };
  const matrix = await matrixOf(wanted.layer, wanted.head, wanted.view);
  if (wanted.layer !== chosen.layer || wanted.head !== chosen.head || wanted.view !== chosen.view) return;
  shown = { matrix, image: mapPicture(matrix, chosen.scale === "row") };
  $("low").textContent = wanted.head === MEAN ? "" : chosen.scale === "row" ? "−row’s largest" : number(-matrix.largest);
  $("high").textContent = chosen.scale === "row" ? "row’s largest" : number(matrix.largest);
  const signed = wanted.head !== MEAN;
  const ramp = picture(1, 256, (_, k) => shade(signed ? (k - 127.5) / 127.5 : k / 255));
  $("ramp").getContext("2d").drawImage(ramp, 0, 0);
  paintMap();
}

function paintMap() {
  const { matrix, image } = shown;
  const width = $("map").clientWidth;
  const side = width - MARGIN;
  const context = prepare($("map"), width, width + TOP);
  context.translate(0, TOP);
  context.drawImage(image, MARGIN, 0, side, side);
  const cell = side / matrix.cells;
  const row = Math.floor(chosen.row / matrix.block);
  const column = chosen.column === null ? null : Math.floor(chosen.column / matrix.block);
  context.strokeStyle = palette.accent;
  context.strokeRect(MARGIN + 0.5, row * cell + 0.5, side - 1, Math.max(cell - 1, 1));
  if (column !== null) context.strokeRect(MARGIN + column * cell + 0.5, 0.5, Math.max(cell - 1, 1), side - 1);
  labels(context, matrix, cell, row, column);
  readout(matrix, row, column);
}

function labels(context, matrix, cell, row, column) {
  const step = Math.max(1, Math.ceil(13 / cell));
  const fit = (text) => (text.length > 9 ? `${text.slice(0, 8)}…` : text);
  // Small cells share a label, which then reads on from the one before.
  const label = (c, marked) => fit(data.tokens.slice(c * matrix.block, (c + (c === marked ? 1 : step)) * matrix.block).map(visible).join("").replace(/␣/g, " "));
  const free = (c, marked) => marked === null || c === marked || Math.abs(c - marked) * cell >= 12;
  const at = (marked) => {
    const places = [];
    for (let c = 0; c < matrix.cells; c += step) if (free(c, marked)) places.push(c);
    if (marked !== null && !places.includes(marked)) places.push(marked);
    return places;
  };
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (const c of at(row)) {
    context.fillStyle = c === row ? palette.ink : palette.quiet;
    context.fillText(label(c, row), MARGIN - 6, (c + 0.5) * cell);
  }
  for (const c of at(column)) {
    context.save();
    context.translate(MARGIN + (c + 0.5) * cell, matrix.cells * cell + 6);
    context.rotate(-Math.PI / 2);
    context.fillStyle = c === column ? palette.ink : palette.quiet;
    context.fillText(label(c, column), 0, 0);
    context.restore();
  }
}

function readout(matrix, row, column) {
  const where = `${layerName(chosen.layer)}, ${headName(chosen.head)}.`;
  let text = `Row ${span(row, matrix.block)}`;
  if (column === null) text += ": point at an entry, or use the arrow keys";
  else if (column > row) text += ` reads no later token; column ${span(column, matrix.block)}`;
  else text += ` reads ${span(column, matrix.block)} with ${number(matrix.value(row, column))}`;
  $("readout").textContent = `${text}; ${where}`;
}

function pointed(event) {
  const box = $("map").getBoundingClientRect();
  const cell = (box.width - MARGIN) / shown.matrix.cells;
  const [i, j] = [Math.floor((event.clientY - box.top - TOP) / cell), Math.floor((event.clientX - box.left - MARGIN) / cell)];
  const inside = i >= 0 && j >= 0 && i < shown.matrix.cells && j < shown.matrix.cells;
  return inside ? { i, j, block: shown.matrix.block } : null;
}

const tokenOf = (cell, block) => Math.min((cell + 1) * block, length) - 1;

/* Thumbnails of the heads. */

async function drawHeads() {
  const { layer, view, scale } = chosen;
  const heads = [MEAN, ...Array(data.layers[layer].heads).keys()];
  const matrices = await Promise.all(heads.map((head) => matrixOf(layer, head, view)));
  if (layer !== chosen.layer || view !== chosen.view || scale !== chosen.scale) return;
  $("heads").replaceChildren(
    ...heads.map((head, k) => {
      const button = document.createElement("button");
      const image = mapPicture(matrices[k], scale === "row");
      button.type = "button";
      button.dataset.head = head;
      button.setAttribute("aria-pressed", head === chosen.head);
      button.setAttribute("aria-label", headName(head));
      button.append(image, head === MEAN ? "mean" : `${head}`);
      button.onclick = () => choose({ head });
      return button;
    }),
  );
}

/* The text. */

const STRIP_NOTES = {
  rollout: "How much each token counts for the chosen one, through all layers. Choose a token by a click or the arrow keys.",
  attribution: "How much each token counts for the prediction after the last one.",
  gradient: "Embedding times gradient for the prediction after the last token: blue raises its logit, orange lowers it.",
  row: "The chosen token’s row of the map.",
};

async function drawStrip() {
  const { strip, view, layer, head, row } = chosen;
  let values, own = row;
  if (strip === "attribution" || strip === "gradient") {
    values = strip === "gradient" ? data.inputGradient : data.attribution[view];
    own = length - 1;
  } else {
    const matrix = strip === "rollout" ? await rolloutOf(view) : await matrixOf(layer, head, view);
    const i = Math.floor(row / matrix.block);
    values = data.tokens.map((_, j) => (j > row ? 0 : matrix.value(i, Math.floor(j / matrix.block))));
  }
  const most = Math.max(...values.map((v, j) => (j === own ? 0 : Math.abs(v))), 1e-30);
  [...$("strip").children].forEach((element, j) => {
    const t = Math.sign(values[j]) * Math.sqrt(Math.min(Math.abs(values[j]) / most, 1));
    const colour = strip === "gradient" || strip === "row" ? palette[t < 0 ? "less" : "more"][0] : palette.glow;
    element.style.background = `rgb(${colour.join(" ")} / ${(0.75 * Math.abs(t)).toFixed(3)})`;
    element.title = `${visible(data.tokens[j])} (${j}): ${number(values[j])}`;
    element.classList.toggle("chosen", j === row);
  });
  $("strip-note").textContent =
    `${STRIP_NOTES[strip]} Chosen: ${span(row, 1)}, ${number(values[row])}; the colours are scaled to the largest other token, by square root.`;
}

function makeStrip() {
  $("strip").replaceChildren(
    ...data.tokens.map((token, j) => {
      const element = document.createElement("span");
      if (j < data.special) element.className = "mark";
      element.textContent = token.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t") || "∅";
      element.onclick = () => choose({ row: j });
      return element;
    }),
  );
}

/* Overviews: layers down, heads across. */

const OVERVIEWS = [
  { id: "context", of: (layer) => layer.context[chosen.view], most: length, unit: "tokens" },
  { id: "half-life", of: (layer) => layer.halfLives && layer.halfLives.map((q) => q[2]), most: null, unit: "tokens" },
];

function drawOverview({ id, of, most, unit }) {
  const rows = data.layers.map(of);
  const heads = Math.max(...data.layers.map((layer) => layer.heads));
  const top = most ?? Math.max(2, ...rows.flatMap((row) => (row ?? []).filter((v) => v !== null)));
  const level = (v) => (v === null ? 1 : Math.min(Math.max(Math.log(Math.max(v, 1)) / Math.log(Math.max(top, 2)), 0.04), 1));
  const there = (i, j) => rows[i] && j < rows[i].length;
  const image = picture(rows.length, heads, (i, j) => (there(i, j) ? shade(level(rows[i][j])) : palette.future));
  const [left, tall] = [34, Math.max(7, Math.min(18, 320 / rows.length))];
  const width = $(id).clientWidth;
  const context = prepare($(id), width, rows.length * tall + 22);
  context.drawImage(image, left, 0, width - left, rows.length * tall);
  context.fillStyle = palette.quiet;
  context.textBaseline = "middle";
  context.textAlign = "right";
  const everyLayer = Math.ceil(12 / tall);
  data.layers.forEach((layer, i) => i % everyLayer === 0 && context.fillText(layer.index, left - 6, (i + 0.5) * tall));
  context.textAlign = "center";
  const wide = (width - left) / heads;
  const everyHead = Math.ceil(22 / wide);
  for (let j = 0; j < heads; j += everyHead) context.fillText(j, left + (j + 0.5) * wide, rows.length * tall + 12);
  context.strokeStyle = palette.ink;
  const [j, across] = chosen.head === MEAN ? [0, heads] : [chosen.head, 1];
  context.strokeRect(left + j * wide + 0.5, chosen.layer * tall + 0.5, across * wide - 1, tall - 1);
  const middle = (i) => (there(i, 0) ? [...rows[i]].map((v) => v ?? Infinity).sort((a, b) => a - b)[rows[i].length >> 1] : null);
  const now = chosen.head === MEAN ? middle(chosen.layer) : there(chosen.layer, chosen.head) ? rows[chosen.layer][chosen.head] : null;
  const what = rows[chosen.layer] ? `${chosen.head === MEAN ? "median head" : `head ${chosen.head}`} ${number(Number.isFinite(now) ? now : null)} ${unit}` : "no state";
  $(`${id}-note`).textContent =
    `Layers down, heads across; the strongest colour is ${number(top)} ${unit}, logarithmic. Layer ${data.layers[chosen.layer].index}: ${what}.`;
  $(id).onclick = (event) => {
    const box = $(id).getBoundingClientRect();
    const [row, column] = [Math.floor((event.clientY - box.top) / tall), Math.floor((event.clientX - box.left - left) / wide)];
    if (row >= 0 && row < rows.length) choose({ layer: row, head: column >= 0 && column < data.layers[row].heads ? column : MEAN });
  };
}

/* Decay spectra of the chosen layer. */

function drawSpectrum() {
  const layer = data.layers[chosen.layer];
  $("spectrum-title").textContent = `Decay spectra, ${layerName(chosen.layer)}`;
  if (!layer.halfLives) {
    $("spectrum").textContent = "Attention keeps every token; nothing decays.";
    return;
  }
  const [width, height, left, bottom] = [$("spectrum").clientWidth, 230, 52, 24];
  const finite = layer.halfLives.flat().filter((v) => v !== null && v > 0);
  const low = Math.floor(Math.log10(Math.min(1, ...finite)));
  const high = Math.ceil(Math.log10(Math.max(10, length, ...finite)));
  const y = (v) => 6 + (1 - (Math.min(Math.log10(v ?? Infinity), high) - low) / (high - low)) * (height - bottom - 6);
  const wide = (width - left) / layer.heads;
  const parts = [`<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="Half-lives of ${layer.heads} heads">`];
  for (let power = low; power <= high; power++) {
    parts.push(`<line class="grid" x1="${left}" x2="${width}" y1="${y(10 ** power)}" y2="${y(10 ** power)}"/>`);
    parts.push(`<text x="${left - 6}" y="${y(10 ** power) + 4}" text-anchor="end">${Number((10 ** power).toPrecision(1))}</text>`);
  }
  parts.push(`<line class="length" x1="${left}" x2="${width}" y1="${y(length)}" y2="${y(length)}"/>`);
  layer.halfLives.forEach((q, head) => {
    const x = left + (head + 0.5) * wide;
    const bar = Math.min(wide * 0.6, 18);
    parts.push(`<g class="head" data-head="${head}">`);
    parts.push(`<rect x="${left + head * wide}" y="0" width="${wide}" height="${height}" ${head === chosen.head ? 'class="chosen"' : 'fill="none"'} pointer-events="all"/>`);
    parts.push(`<line class="span" x1="${x}" x2="${x}" y1="${y(q[0])}" y2="${y(q[4])}"/>`);
    parts.push(`<rect class="bar" x="${x - bar / 2}" width="${bar}" y="${y(q[3])}" height="${Math.max(y(q[1]) - y(q[3]), 1)}"/>`);
    parts.push(`<circle class="dot" cx="${x}" cy="${y(q[2])}" r="2.5"/>`);
    if (head % Math.ceil(22 / wide) === 0) parts.push(`<text x="${x}" y="${height - 6}" text-anchor="middle">${head}</text>`);
    parts.push(`<title>head ${head}: median ${number(q[2])} tokens, 5 to 95 %: ${number(q[0])} to ${number(q[4])}</title></g>`);
  });
  $("spectrum").innerHTML = `${parts.join("")}</svg>`;
  for (const group of $("spectrum").querySelectorAll(".head")) group.onclick = () => choose({ head: Number(group.dataset.head) });
}

/* Choices. */

function fill(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
}

let drawing = Promise.resolve();
function choose(change) {
  const before = { ...chosen };
  Object.assign(chosen, change);
  delete chosen.all;
  chosen.head = Math.min(chosen.head, data.layers[chosen.layer].heads - 1);
  const changed = (...names) => names.some((name) => chosen[name] !== before[name]);
  const all = change.all === true;
  if (all || changed("layer")) fill($("head"), [MEAN, ...Array(data.layers[chosen.layer].heads).keys()].map((h) => [h, headName(h)]));
  for (const name of ["view", "layer", "head", "scale"]) $(name).value = chosen[name];
  const work = [];
  if (all || changed("view", "layer", "head", "scale")) work.push(drawMap());
  else if (shown && changed("row", "column")) paintMap();
  if (all || changed("view", "layer", "scale")) work.push(drawHeads());
  for (const button of $("heads").children) button.setAttribute("aria-pressed", Number(button.dataset.head) === chosen.head);
  if (all || changed("strip", "row", "view", "layer", "head")) work.push(drawStrip());
  if (all || changed("view", "layer", "head")) {
    OVERVIEWS.forEach(drawOverview);
    drawSpectrum();
  }
  // The tests, and whoever scripts the page, wait for this.
  drawing = Promise.all([drawing, ...work]).then(() => { document.body.dataset.drawn = JSON.stringify(chosen); });
}

function start() {
  document.title = $("title").textContent = `Looking inside ${data.title}`;
  $("about").textContent = `${data.about} · ${length} tokens`;
  const word = (token) => { const b = document.createElement("b"); b.textContent = visible(token); return b; };
  $("next").append("Next token: ");
  data.predictions.forEach(([token, p], k) => $("next").append(k ? ", " : "", word(token), ` ${(100 * p).toFixed(1)} %`));
  if (data.target !== data.predictions[0][0]) $("next").append("; explained: ", word(data.target));
  $("precision").textContent = data.precision;
  $("map-note").textContent = data.mapBlock > 1
    ? `A cell of a head’s map is ${data.mapBlock} × ${data.mapBlock} tokens, of which it shows the entry of largest magnitude (dualscan inspect --resolution).`
    : "Every cell is one token.";
  fill($("view"), data.views.map((view) => [view, VIEW_NAMES[view]]));
  fill($("layer"), data.layers.map((_, i) => [i, layerName(i)]));
  makeStrip();
  $("view").onchange = (event) => choose({ view: event.target.value });
  $("layer").onchange = (event) => choose({ layer: Number(event.target.value) });
  $("head").onchange = (event) => choose({ head: Number(event.target.value) });
  $("scale").onchange = (event) => choose({ scale: event.target.value });
  $("colour-by").onchange = (event) => choose({ strip: event.target.value });
  $("map").onpointermove = (event) => {
    const at = shown && pointed(event);
    if (at) hover(at);
  };
  $("map").onclick = (event) => {
    const at = shown && pointed(event);
    if (at) choose({ row: tokenOf(at.i, at.block), column: tokenOf(at.j, at.block) });
  };
  $("map").onkeydown = (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!moves[event.key] || !shown) return;
    event.preventDefault();
    const { block, cells } = shown.matrix;
    const step = (token, by) => tokenOf(Math.min(Math.max(Math.floor(token / block) + by, 0), cells - 1), block);
    const [down, right] = moves[event.key];
    choose({ row: step(chosen.row, down), column: step(chosen.column ?? chosen.row, right) });
  };
  $("strip").onkeydown = (event) => {
    const moves = { ArrowLeft: chosen.row - 1, ArrowRight: chosen.row + 1, Home: 0, End: length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose({ row: Math.min(Math.max(moves[event.key], 0), length - 1) });
    $("strip").children[chosen.row].scrollIntoView({ block: "nearest" });
  };
  const again = () => { readPalette(); choose({ all: true }); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  let pause;
  addEventListener("resize", () => { clearTimeout(pause); pause = setTimeout(again, 100); });
  again();
}

function hover({ i, j, block }) {
  const { matrix } = shown;
  const text = j > i ? `${span(i, block)} reads no later token` : `${span(i, block)} reads ${span(j, block)} with ${number(matrix.value(i, j))}`;
  $("readout").textContent = `${text}; ${layerName(chosen.layer)}, ${headName(chosen.head)}.`;
}

start();
