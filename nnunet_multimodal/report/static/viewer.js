// The volume viewer (niivue), and the controls of all.
// ---- niivue -----------------------------------------------------------------------------------------------------
const viewer = { ready: false, opening: false, nv: null, turn: 0 };

async function openViewer() {
  const say = (text) => { byId("viewer-state").textContent = text; };
  if (viewer.opening || !state.volumes) return;
  viewer.opening = true; // and stays so: there is one viewer
  try {
    say("Opening …");
    if (!window.niivue) {
      const code = new Blob([await gunzip(byId("viewer-code").textContent)], { type: "text/javascript" });
      const script = document.createElement("script");
      script.src = URL.createObjectURL(code);
      await new Promise((resolve, reject) => {
        script.onload = resolve;
        script.onerror = () => reject(new Error("the viewer's code was refused"));
        document.head.append(script);
      });
    }
    const canvas = byId("viewer");
    if (!canvas.getContext("webgl2")) throw new Error("this browser shows no WebGL 2");
    byId("viewer-box").hidden = false;
    viewer.nv = new window.niivue.Niivue({ dragAndDropEnabled: false, isResizeCanvas: true, show3Dcrosshair: true,
      isOrientationTextVisible: state.view.oriented, isRadiologicalConvention: true,
      multiplanarShowRender: window.niivue.SHOW_RENDER.ALWAYS, logLevel: "error" });
    await viewer.nv.attachToCanvas(canvas);
    viewer.ready = true;
    await fillViewer();
    say("Click or drag moves, the wheel goes through slices, the right button changes brightness; by keyboard the arrow keys, page up and page down.");
  } catch (error) {
    viewer.opening = false;
    byId("viewer-box").hidden = true;
    say(`The viewer cannot be opened: ${error.message}. The slices above need no WebGL.`);
  }
}

async function fillViewer() {
  if (!state.volumes) return; // of a case that is still being read
  const turn = ++viewer.turn;
  const { niivue } = window;
  const { view, volumes } = state;
  const opacity = byId("viewer-opacity").valueAsNumber / 100;
  const index = Math.max(0, view.images.findIndex((image) => image.name === byId("viewer-image").value));
  const layers = [[volumes.images[index] ?? new Uint8Array(volumes.prediction.length), "image", 1]];
  const overlay = byId("viewer-overlay").value;
  const map = maps().find((one) => `map ${one.name}` === overlay);
  const array = overlay.startsWith("rater ") ? rater(overlay)
    : { prediction: volumes.prediction, reference: volumes.reference, sample: sample() }[overlay];
  if (array) layers.push([array, overlay, opacity]);
  if (map) layers.push([await volume(`map ${state.run} ${map.name}`, () => unfold(view, map.data)), "map", opacity]);
  const images = await Promise.all(layers.map(async ([array, name, visible]) => {
    const own = await niivue.NVImage.new(nifti(view, array), `${name}.nii`, name === "map" ? "viridis" : "gray", visible);
    if (name === "image") return Object.assign(own, { cal_min: 0, cal_max: 255 });
    if (name === "map") return Object.assign(own, { cal_min: 16, cal_max: 255, colormapType: 1 }); // clear below
    own.setColormapLabel(labelColours(view));
    return own;
  }));
  if (turn !== viewer.turn) return; // something else was chosen meanwhile
  while (viewer.nv.volumes.length) viewer.nv.removeVolumeByIndex(viewer.nv.volumes.length - 1);
  for (const image of images) viewer.nv.addVolume(image);
  viewer.nv.setSliceType(view.shape[0] === 1 ? 0 : Number(byId("viewer-type").value));
  viewer.nv.updateGLVolume();
}

function labelColours(view) { // niivue's colour table of the label map's indices
  const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: ["background"] };
  const most = Math.max(1, ...view.labels.flatMap(([, indices]) => indices));
  for (let value = 1; value <= most; value++) {
    const own = view.labels.findLastIndex(([, indices]) => indices.includes(value));
    const colour = own < 0 ? [0, 0, 0] : colourOf(own);
    ["R", "G", "B"].forEach((channel, i) => table[channel].push(colour[i]));
    table.A.push(own < 0 ? 0 : 255);
    table.I.push(value);
    table.labels.push(view.labels[own]?.[0] ?? "");
  }
  return table;
}

// right, front and up on the screen, in voxels towards the patient's right, front and head
const STEPS = { ArrowRight: [-1, 0, 0], ArrowLeft: [1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0], PageUp: [0, 0, 1],
  PageDown: [0, 0, -1] };
const TURN = 5; // degrees

function steer(event) {
  const step = STEPS[event.key];
  if (!viewer.ready || !step) return;
  event.preventDefault();
  const { scene } = viewer.nv;
  if (byId("viewer-type").value !== "4") viewer.nv.moveCrosshairInVox(...step);
  else viewer.nv.setRenderAzimuthElevation(scene.renderAzimuth - TURN * step[0], scene.renderElevation + TURN * step[1]);
}

function start() {
  const on = (id, event, action) => byId(id).addEventListener(event, action);
  on("view-case", "change", (event) => openCase(Number(event.target.value), state.run));
  on("view-run", "change", (event) => openCase(state.index, event.target.value));
  const toLargest = () => {
    if (state.volumes) setPlane(true);
    draw();
  };
  on("view-plane", "change", toLargest);
  on("view-largest", "click", toLargest);
  on("view-rater", "change", (event) => { state.rater = event.target.value; });
  on("view-sample", "input", () => { byId("show-samples").checked = true; });
  for (const id of ["view-slice", "view-sample", "view-brightness", "view-contrast"]) on(id, "input", draw);
  for (const id of ["show-reference", "show-prediction", "show-samples", "view-rater", "view-label", "view-map"]) on(id, "change", draw);
  on("viewer-open", "click", openViewer);
  on("viewer", "keydown", steer);
  for (const id of ["view-sample", "viewer-image", "viewer-overlay", "viewer-type", "viewer-opacity"]) {
    on(id, "change", () => { if (viewer.ready) fillViewer(); });
  }
  openCase(Number(byId("view-case").value), data.runs[0]); // a browser may have kept what was chosen before
}
if (viewScripts.length) start();
