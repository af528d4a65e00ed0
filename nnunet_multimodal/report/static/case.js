// The chosen case: its volumes, planes and pictures.
const loaded = new Map(); // of one case and its predictions
function volume(name, make) {
  if (!loaded.has(name)) loaded.set(name, make());
  return loaded.get(name);
}

// ---- the chosen case ------------------------------------------------------------------------------------------
const state = { index: -1, view: null, run: "", volumes: null };
const maps = () => [...state.view.runs[state.run].maps, ...state.view.maps];
const shown = (id) => byId(id).checked;
const colourOf = (index) => COLOURS[index % COLOURS.length];

function options(select, names, selected) {
  select.replaceChildren(...names.map(([value, text]) => new Option(text, value, false, value === selected)));
}

function choose(name, run) {
  const index = [...byId("view-case").options].findIndex((option) => option.text === name);
  if (index < 0) return;
  byId("view-case").value = String(index);
  openCase(index, run).then(() => {
    byId("case").scrollIntoView();
    byId("view-slice").focus({ preventScroll: true });
  });
}

async function openCase(index, run) {
  if (index !== state.index) loaded.clear();
  const first = index !== state.index;
  state.index = index;
  state.view = viewOf(index);
  const runs = Object.keys(state.view.runs);
  state.run = runs.includes(run) ? run : runs[0];
  options(byId("view-run"), runs.map((name) => [name, name]), state.run);
  try {
    await openRun(first);
  } catch (error) { // such as a browser that cannot unpack gzip
    byId("view-title").textContent = `The pictures cannot be shown: ${error.message}`;
  }
}

async function openRun(first) {
  const { view, run, index } = state;
  const own = view.runs[run];
  const before = byId("view-map").value;
  options(byId("view-map"), [["", "none"], ...maps().map((map) => [map.name, map.name])], before);
  byId("sample-control").hidden = byId("show-samples").parentElement.hidden = !own.num_samples;
  byId("view-sample").max = Math.max(1, own.num_samples);
  byId("show-reference").parentElement.hidden = view.reference === null;
  byId("view-plane").disabled = view.shape[0] === 1;
  if (view.shape[0] === 1) byId("view-plane").value = "0";
  const overlays = [["prediction", "prediction"], ...(view.reference ? [["reference", "reference"]] : []),
    ...(own.num_samples ? [["sample", "sample"]] : []), ...maps().map((map) => [`map ${map.name}`, map.name]), ["", "none"]];
  options(byId("viewer-overlay"), overlays, byId("viewer-overlay").value || "prediction");
  options(byId("viewer-image"), view.images.map((image) => [image.name, image.name]), byId("viewer-image").value);
  const [images, reference, prediction, samples] = await Promise.all([
    Promise.all(view.images.map((image) => volume(`image ${image.name}`, () => unfold(view, image.data)))),
    view.reference && volume("reference", () => gunzip(view.reference)),
    volume(`prediction ${run}`, () => gunzip(own.prediction)),
    own.samples && volume(`samples ${run}`, () => gunzip(own.samples)),
  ]);
  if (state.index !== index || state.run !== run) return; // another one was chosen meanwhile
  state.volumes = { images, reference, prediction, samples };
  setPlane(first);
  describe();
  await draw();
  if (viewer.ready) await fillViewer();
}

function sample() {
  const size = state.volumes.prediction.length;
  const number = Number(byId("view-sample").value) - 1;
  return state.volumes.samples?.subarray(number * size, (number + 1) * size) ?? null;
}

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

function largestSlice() {
  const { shape } = state.view;
  const { through } = plane();
  const counts = new Float64Array(shape[through]);
  const count = (array) => {
    for (let z = 0, at = 0; z < shape[0]; z++) for (let y = 0; y < shape[1]; y++) for (let x = 0; x < shape[2]; x++, at++) {
      if (array[at]) counts[[z, y, x][through]]++;
    }
  };
  count(state.volumes.prediction);
  if (!counts.some(Boolean) && state.volumes.reference) count(state.volumes.reference);
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

function outline(context, size, indices, colour, dashed) { // the edges between voxels inside and outside
  const [sx, sy] = [context.canvas.width / size.width, context.canvas.height / size.height];
  const inside = (x, y) => x >= 0 && y >= 0 && x < size.width && y < size.height && indices.has(size.slice[y * size.width + x]);
  const path = new Path2D();
  const dash = Math.ceil(7 / Math.min(sx, sy)); // voxels
  const edge = (x0, y0, x1, y1) => {
    if (dashed && Math.floor((x0 + y0) / dash) % 2) return;
    path.moveTo(x0 * sx, y0 * sy);
    path.lineTo(x1 * sx, y1 * sy);
  };
  for (let y = 0; y <= size.height; y++) for (let x = 0; x <= size.width; x++) {
    if (inside(x, y) !== inside(x - 1, y)) edge(x, y, x, y + 1);
    if (inside(x, y) !== inside(x, y - 1)) edge(x, y, x + 1, y);
  }
  context.lineCap = dashed ? "butt" : "square";
  for (const [width, style] of dashed ? [[3.4, "#fff"], [1.8, `rgb(${colour})`]] : [[4.5, "#000"], [2.2, `rgb(${colour})`]]) {
    context.lineWidth = width;
    context.strokeStyle = style;
    context.stroke(path);
  }
}

function legend(map) {
  const items = Object.keys(state.view.labels).map((name, i) => {
    const item = document.createElement("span");
    const swatch = document.createElement("i");
    swatch.style.background = `rgb(${colourOf(i)})`;
    item.append(swatch, name);
    return item;
  });
  if (map) {
    const item = document.createElement("span");
    const swatch = document.createElement("i");
    swatch.className = "ramp";
    item.append(swatch, `${map.name}: 0 to ${map.high.toPrecision(3)}`);
    items.push(item);
  }
  byId("legend").replaceChildren(...items);
}

let drawing = 0;
async function draw() {
  if (!state.volumes) return;
  const turn = ++drawing;
  const { view, volumes } = state;
  const at = Number(byId("view-slice").value);
  const map = maps().find((one) => one.name === byId("view-map").value);
  const mapVolume = map && (await volume(`map ${state.run} ${map.name}`, () => unfold(view, map.data)));
  if (turn !== drawing) return;
  const [brightness, contrast] = [byId("view-brightness").valueAsNumber, byId("view-contrast").valueAsNumber / 100];
  const { row, column, through } = plane();
  const mm = [view.shape[row] * view.spacing[row], view.shape[column] * view.spacing[column]];
  const canvases = (volumes.images.length ? view.images : [{ name: "no image" }]).map((image, i) => {
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round((SIDE * mm[1]) / Math.max(...mm)));
    canvas.height = Math.max(1, Math.round((SIDE * mm[0]) / Math.max(...mm)));
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${image.name}, slice ${at + 1}`);
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (volumes.images[i]) {
      paint(context, pick(volumes.images[i], at), true, (value) => {
        const grey = (value - 128) * contrast + 128 + brightness;
        return [grey, grey, grey, 255];
      });
    }
    if (mapVolume) paint(context, pick(mapVolume, at), true, (value) => [...ramp(value / 255), Math.min(200, 1.6 * value)]);
    const labels = Object.values(view.labels).map((indices) => new Set(indices));
    if (shown("show-prediction")) {
      const size = pick(volumes.prediction, at);
      const painted = labels.map((set, i) => [set, colourOf(i)]);
      paint(context, size, false, (value) => { // of overlapping regions the last, usually smallest one
        const found = painted.findLast(([set]) => set.has(value));
        return found ? [...found[1], 105] : [0, 0, 0, 0];
      });
    }
    const lines = [[sample(), shown("show-samples"), true], [volumes.reference, shown("show-reference"), false]];
    for (const [array, wanted, dashed] of lines) {
      if (array && wanted) labels.forEach((set, i) => outline(context, pick(array, at), set, colourOf(i), dashed));
    }
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = image.name;
    figure.append(canvas, caption);
    return figure;
  });
  byId("panels").replaceChildren(...canvases);
  byId("slice-text").textContent = `${at + 1} of ${view.shape[through]}`;
  const own = view.runs[state.run];
  const total = data.cases[view.case]?.runs[state.run]?.samples ?? own.num_samples;
  const weights = data.cases[view.case]?.runs[state.run]?.weights;
  const number = Number(byId("view-sample").value);
  byId("sample-text").textContent = `${number} of ${own.num_samples}` + (total > own.num_samples ? ` (of ${total} drawn)` : "") +
    (weights ? `, weight ${weights[number - 1].toFixed(3)}` : "");
  legend(map);
}
