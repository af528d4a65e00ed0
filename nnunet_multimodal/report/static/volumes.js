// What the page holds: its data, and the volumes of cases. The files here are one script (see page.py).
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const viewScripts = [...document.querySelectorAll("script.view")];
const COLOURS = [[230, 159, 0], [86, 180, 233], [0, 158, 115], [204, 121, 167], [240, 228, 66], [213, 94, 0], [0, 114, 178]];
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const SIDE = 420; // pixels of a picture's longer side

// ---- reading what the page holds of a case --------------------------------------------------------------------
const parsed = new Map();
const viewOf = (index) => {
  if (!parsed.has(index)) parsed.set(index, JSON.parse(viewScripts[index].textContent));
  return parsed.get(index);
};

async function gunzip(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unfold(view, text) { // a mosaic of slices -> (Z, Y, X) bytes
  const image = new Image();
  image.src = `data:image/webp;base64,${text}`;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height).data;
  const [depth, height, width] = view.shape;
  const volume = new Uint8Array(depth * height * width);
  for (let z = 0, to = 0; z < depth; z++) {
    const top = Math.floor(z / view.columns) * height;
    const left = (z % view.columns) * width;
    for (let y = 0; y < height; y++) {
      for (let x = 0, from = 4 * ((top + y) * image.width + left); x < width; x++, from += 4) volume[to++] = pixels[from];
    }
  }
  return volume;
}

function nifti(view, array) { // bytes (Z, Y, X) as NIfTI-1
  const { shape, spacing, affine } = view;
  const buffer = new ArrayBuffer(352 + array.length);
  const header = new DataView(buffer);
  header.setInt32(0, 348, true);
  [3, shape[2], shape[1], shape[0], 1, 1, 1, 1].forEach((size, i) => header.setInt16(40 + 2 * i, size, true));
  header.setInt16(70, 2, true); // uint8
  header.setInt16(72, 8, true);
  [1, spacing[2], spacing[1], spacing[0]].forEach((size, i) => header.setFloat32(76 + 4 * i, size, true));
  header.setFloat32(108, 352, true);
  header.setFloat32(112, 1, true);
  header.setUint8(123, 2); // mm
  header.setInt16(254, 1, true); // sform
  affine.slice(0, 3).forEach((row, r) => row.forEach((value, c) => header.setFloat32(280 + 16 * r + 4 * c, value, true)));
  [0x6e, 0x2b, 0x31, 0].forEach((byte, i) => header.setUint8(344 + i, byte));
  new Uint8Array(buffer, 352).set(array);
  return buffer;
}
