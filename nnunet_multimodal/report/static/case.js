// The chosen case: its volumes, planes and pictures.
const loaded = new Map(); // of one case and its predictions
function volume(name, make) {
  if (!loaded.has(name)) loaded.set(name, make());
  return loaded.get(name);
}

// ---- the chosen case ------------------------------------------------------------------------------------------
// volumes: null until they are read; fresh: the slice is still that of the case before
const state = { index: -1, view: null, run: "", rater: "all", volumes: null, fresh: true };
const maps = () => [...state.view.runs[state.run].maps, ...state.view.maps];
const shown = (id) => byId(id).checked;
const colourOf = (index) => COLOURS[index % COLOURS.length];

function options(select, names, selected) { // the first one where what is selected is not there
  select.replaceChildren(...names.map(([value, text]) => new Option(text, value, false, value === selected)));
}

function choose(index, run) {
  byId("view-case").value = String(index);
  openCase(index, run).then(() => {
    byId("case").scrollIntoView();
    byId(state.view.shape[0] === 1 ? "view-case" : "view-slice").focus({ preventScroll: true });
  });
}

async function openCase(index, run) {
  if (index !== state.index) {
    loaded.clear();
    state.fresh = true;
  }
  state.index = index;
  state.view = viewOf(index);
  state.volumes = null;
  const runs = Object.keys(state.view.runs);
  state.run = runs.includes(run) ? run : runs[0];
  options(byId("view-run"), runs.map((name) => [name, name]), state.run);
  try {
    await openRun();
  } catch (error) { // such as a browser that cannot unpack gzip
    byId("view-title").textContent = `The pictures cannot be shown: ${error.message}`;
  }
}

function fillControls() { // with what the case and its predictions have
  const { view, run } = state;
  const own = view.runs[run];
  const named = maps().map((map) => [map.name, map.name]);
  const [labels, raters] = [view.labels.map(([name]) => [name, name]), view.raters.map((name) => [`rater ${name}`, name])];
  const hide = (id, hidden) => { byId(id).closest("label, button").hidden = hidden; };
  options(byId("view-map"), [["", "none"], ...named], byId("view-map").value);
  options(byId("view-label"), [["", "all"], ...labels], byId("view-label").value);
  options(byId("view-rater"), [["all", "all"], ...raters, ["none", "none"]], state.rater);
  byId("view-sample").max = Math.max(1, own.num_samples);
  for (const id of ["view-sample", "show-samples"]) hide(id, !own.num_samples);
  for (const id of ["view-plane", "view-slice", "view-largest"]) hide(id, view.shape[0] === 1);
  hide("show-reference", !view.reference);
  hide("view-rater", !raters.length);
  hide("view-label", labels.length < 2);
  if (view.shape[0] === 1) byId("view-plane").value = "0";
  const overlays = [["prediction", "prediction"], ...(view.reference ? [["reference", "reference"]] : []),
    ...(own.num_samples ? [["sample", "sample"]] : []), ...raters.map(([value]) => [value, value]),
    ...named.map(([name]) => [`map ${name}`, name]), ["none", "none"]];
  options(byId("viewer-overlay"), overlays, byId("viewer-overlay").value);
  options(byId("viewer-image"), view.images.map((image) => [image.name, image.name]), byId("viewer-image").value);
}

async function openRun() {
  const { view, run, index } = state;
  const own = view.runs[run];
  fillControls();
  const [images, reference, raters, prediction, samples] = await Promise.all([
    Promise.all(view.images.map((image) => volume(`image ${image.name}`, () => unfold(view, image.data)))),
    view.reference && volume("reference", () => gunzip(view.reference)),
    view.rater_labels && volume("raters", () => gunzip(view.rater_labels)),
    volume(`prediction ${run}`, () => gunzip(own.prediction)),
    own.samples && volume(`samples ${run}`, () => gunzip(own.samples)),
  ]);
  if (state.index !== index || state.run !== run) return; // another one was chosen meanwhile
  state.volumes = { images, reference, raters, prediction, samples };
  setPlane(state.fresh);
  state.fresh = false;
  describe();
  await draw();
  if (viewer.ready) await fillViewer();
}

function nth(array, number) { // of label maps that lie one after the other; null without any
  const size = state.volumes.prediction.length;
  return array?.subarray(number * size, (number + 1) * size) ?? null;
}
const sample = () => nth(state.volumes.samples, Number(byId("view-sample").value) - 1);
const rater = (value) => nth(state.volumes.raters, state.view.raters.indexOf(value.slice("rater ".length)));

// ---- planes: axes of columns and rows, and which of them run backwards on the screen ---------------------------
const PLANES = [
  { through: 0, row: 1, column: 2, flip: false },
  { through: 1, row: 0, column: 2, flip: true },
  { through: 2, row: 0, column: 1, flip: true },
];
const plane = () => PLANES[Number(byId("view-plane").value)];

function pick(array, at) { // a slice, bytes (rows, columns)
  const { shape } = state.view;
  const steps = [shape[1] * shape[2], shape[2], 1];
  const { through, row, column, flip } = plane();
  const [height, width] = [shape[row], shape[column]];
  const slice = new Uint8Array(height * width);
  for (let y = 0, to = 0; y < height; y++) {
    let from = at * steps[through] + (flip ? height - 1 - y : y) * steps[row];
    for (let x = 0; x < width; x++, from += steps[column]) slice[to++] = array[from];
  }
  return { slice, height, width };
}

function largestSlice() { // of the prediction, else of the reference, else of a rater
  const { shape } = state.view;
  const { through } = plane();
  const counts = new Float64Array(shape[through]);
  const count = (array) => {
    for (let z = 0, at = 0; z < shape[0]; z++) for (let y = 0; y < shape[1]; y++) for (let x = 0; x < shape[2]; x++, at++) {
      if (array[at]) counts[[z, y, x][through]]++;
    }
  };
  const { prediction, reference } = state.volumes;
  for (const array of [prediction, reference, ...state.view.raters.map((_, number) => nth(state.volumes.raters, number))]) {
    if (array && !counts.some(Boolean)) count(array);
  }
  return counts.some(Boolean) ? counts.indexOf(Math.max(...counts)) : Math.floor(shape[through] / 2);
}

function setPlane(toLargest) {
  const slider = byId("view-slice");
  slider.max = state.view.shape[plane().through] - 1;
  if (toLargest) slider.value = largestSlice();
}

// ---- pictures -------------------------------------------------------------------------------------------------
function ramp(share) {
  const at = Math.min(share, 0.9999) * (VIRIDIS.length - 1);
  const [low, high, part] = [VIRIDIS[Math.floor(at)], VIRIDIS[Math.floor(at) + 1], at % 1];
  return low.map((value, i) => value + part * (high[i] - value));
}

function paint(context, size, smooth, colour) { // colour(i) -> [r, g, b, a] of the slice's pixels
  const image = new ImageData(size.width, size.height);
  for (let i = 0; i < size.slice.length; i++) image.data.set(colour(size.slice[i]), 4 * i);
  const small = new OffscreenCanvas(size.width, size.height);
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = smooth;
  context.drawImage(small, 0, 0, context.canvas.width, context.canvas.height);
}

function contour(size, indices) { // along the edges of the voxels inside, closed lines of whole voxels
  const { slice, width, height } = size;
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && indices.has(slice[y * width + x]);
  const corners = new Map(); // number of a corner -> corners that follow, the inside on the right
  const number = (x, y) => y * (width + 1) + x;
  const add = (x0, y0, x1, y1) => {
    const from = number(x0, y0);
    if (!corners.has(from)) corners.set(from, []);
    corners.get(from).push([x1, y1]);
  };
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    if (!inside(x, y)) continue;
    if (!inside(x, y - 1)) add(x, y, x + 1, y);
    if (!inside(x + 1, y)) add(x + 1, y, x + 1, y + 1);
    if (!inside(x, y + 1)) add(x + 1, y + 1, x, y + 1);
    if (!inside(x - 1, y)) add(x, y + 1, x, y);
  }
  const path = new Path2D();
  for (const [start, ends] of corners) while (ends.length) { // as many lines end in a corner as begin there
    path.moveTo(start % (width + 1), Math.floor(start / (width + 1)));
    for (let at = -1; at !== start;) {
      const [x, y] = corners.get(at < 0 ? start : at).pop();
      path.lineTo(x, y);
      at = number(x, y);
    }
    path.closePath();
  }
  return path;
}

// width and colour of the line below, width of the label's line above, dashes and gaps in pixels
const LINES = { reference: [4.5, "#000", 2.2, []], sample: [3.6, "#fff", 1.8, [7, 5]], rater: [3.2, "#000", 2.2, [0, 5]] };

function outline(context, size, indices, colour, [below, under, above, dashes]) {
  const scale = new DOMMatrix().scale(context.canvas.width / size.width, context.canvas.height / size.height);
  const path = new Path2D();
  path.addPath(contour(size, indices), scale);
  context.setLineDash(dashes);
  context.lineCap = dashes[0] === 0 ? "round" : "butt"; // dots
  for (const [width, style] of [[below, under], [above, `rgb(${colour})`]]) {
    context.lineWidth = width;
    context.strokeStyle = style;
    context.stroke(path);
  }
}

// What is over the images: the chosen labels as the controls say, and in words what each line is.
function overlays() {
  const { view, volumes } = state;
  const chosen = byId("view-label").value;
  const labels = view.labels.map(([name, indices], i) => ({ name, indices: new Set(indices), colour: colourOf(i) }))
    .filter(({ name }) => !chosen || name === chosen);
  const drawn = view.raters.filter((name) => ["all", `rater ${name}`].includes(byId("view-rater").value));
  const number = byId("view-sample").value;
  const lines = [
    ...drawn.map((name) => [rater(`rater ${name}`), "rater", ""]),
    [shown("show-reference") && volumes.reference, "reference", "reference"],
    [shown("show-samples") && sample(), "sample", `sample ${number}`],
  ].filter(([array]) => array);
  const words = [...(shown("show-prediction") ? [["filled", "prediction"]] : []),
    ...lines.filter(([, , text]) => text).map(([, kind, text]) => [kind, text]),
    ...(drawn.length ? [["rater", `raters ${drawn.join(", ")}`]] : [])];
  return { labels, lines, words };
}

function legend(labels, words, map) {
  const item = (name, colour, text) => {
    const [element, swatch] = [document.createElement("span"), document.createElement("i")];
    swatch.className = name;
    swatch.style.background = colour;
    element.append(swatch, text);
    return element;
  };
  byId("legend").replaceChildren(...labels.map(({ name, colour }) => item("", `rgb(${colour})`, name)),
    ...words.map(([kind, text]) => item(kind, "", text)),
    ...(map ? [item("ramp", "", `${map.name}: 0 to ${map.high.toPrecision(3)}`)] : []));
}

let drawing = 0;
async function draw() {
  if (!state.volumes) return;
  const turn = ++drawing;
  const { view, volumes } = state;
  const map = maps().find((one) => one.name === byId("view-map").value);
  const mapVolume = map && (await volume(`map ${state.run} ${map.name}`, () => unfold(view, map.data)));
  if (turn !== drawing || volumes !== state.volumes) return;
  const at = Number(byId("view-slice").value);
  const [brightness, contrast] = [byId("view-brightness").valueAsNumber, byId("view-contrast").valueAsNumber / 100];
  const { row, column, through } = plane();
  const mm = [view.shape[row] * view.spacing[row], view.shape[column] * view.spacing[column]];
  const [width, height] = [mm[1], mm[0]].map((size) => Math.max(1, Math.round((SIDE * size) / Math.max(...mm))));
  const { labels, lines, words } = overlays();
  const over = new OffscreenCanvas(width, height).getContext("2d"); // the same on all images
  if (mapVolume) paint(over, pick(mapVolume, at), true, (value) => [...ramp(value / 255), Math.min(200, 1.6 * value)]);
  if (shown("show-prediction")) {
    paint(over, pick(volumes.prediction, at), false, (value) => { // of overlapping regions the last, usually smallest one
      const found = labels.findLast(({ indices }) => indices.has(value));
      return found ? [...found.colour, 105] : [0, 0, 0, 0];
    });
  }
  for (const [array, kind] of lines) {
    for (const { indices, colour } of labels) outline(over, pick(array, at), indices, colour, LINES[kind]);
  }
  const text = `${at + 1} of ${view.shape[through]}`;
  const figures = (volumes.images.length ? view.images : [{ name: "no image" }]).map((image, i) => {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${image.name}, slice ${text}`);
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, width, height);
    if (volumes.images[i]) {
      paint(context, pick(volumes.images[i], at), true, (value) => {
        const grey = (value - 128) * contrast + 128 + brightness;
        return [grey, grey, grey, 255];
      });
    }
    context.drawImage(over.canvas, 0, 0);
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = image.name;
    figure.append(canvas, caption);
    return figure;
  });
  byId("panels").replaceChildren(...figures);
  byId("slice-text").textContent = text;
  byId("view-slice").setAttribute("aria-valuetext", text);
  const own = view.runs[state.run];
  const { samples, weights } = data.cases[view.case].runs[state.run];
  const number = Number(byId("view-sample").value);
  const weight = weights?.[number - 1];
  byId("sample-text").textContent = `${number} of ${own.num_samples}` + (samples > own.num_samples ? ` (of ${samples} drawn)` : "") +
    (Number.isFinite(weight) ? `, weight ${weight.toFixed(3)}` : "");
  legend(labels, words, map);
}
