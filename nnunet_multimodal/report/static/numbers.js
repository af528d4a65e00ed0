// Volumes and contributions of the chosen case, and the table of all cases.
// ---- volumes and contributions ----------------------------------------------------------------------------------
function svg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function paragraph(text) {
  const element = document.createElement("p");
  element.className = "none";
  element.textContent = text;
  return element;
}

function volumeChart(own) {
  const rows = Object.entries(own?.labels ?? {}).filter(([, label]) => label.volume_ml);
  if (!rows.length) return paragraph("No volumes of this case: nnunet-multimodal predict writes them (CASE.json).");
  const most = Math.max(1e-9, ...rows.flatMap(([name, { volume_ml: v }]) => [v["p97.5"], v.prediction, own.references_ml[name] ?? 0]));
  const [left, width, step] = [10, 520, 46];
  const chart = svg("svg", { class: "interval", viewBox: `0 0 ${left + width + 20} ${rows.length * step + 26}`,
    width: left + width + 20, role: "img", "aria-label": "Volumes with the samples' intervals" });
  const x = (ml) => left + (ml / most) * width;
  rows.forEach(([name, { volume_ml: v, lesion_count: lesions }], i) => {
    const y = i * step + 32;
    const truth = own.references_ml[name];
    const interval = own.samples > 1 ? `, samples ${v.p50.toFixed(1)} [${v["p2.5"].toFixed(1)}, ${v["p97.5"].toFixed(1)}]` : "";
    const text = `${name}: prediction ${v.prediction.toFixed(1)} ml${interval}` +
      (truth === null || truth === undefined ? "" : `, reference ${truth.toFixed(1)}`) + `; lesions ${lesions.prediction}`;
    chart.append(svg("text", { x: left, y: y - 14 }, text));
    chart.append(svg("line", { x1: x(v["p2.5"]), x2: x(v["p97.5"]), y1: y, y2: y, stroke: "#56b4e9", "stroke-width": 7 }));
    chart.append(svg("line", { x1: x(v.p50), x2: x(v.p50), y1: y - 6, y2: y + 6, stroke: "#0072b2", "stroke-width": 2 }));
    chart.append(svg("circle", { cx: x(v.prediction), cy: y, r: 5, fill: "#d55e00", stroke: "#fff" }));
    if (truth !== null && truth !== undefined) {
      chart.append(svg("path", { d: `M ${x(truth)} ${y - 7} l 6 7 l -6 7 l -6 -7 z`, fill: "none", stroke: "#000", "stroke-width": 2 }));
    }
  });
  chart.append(svg("text", { x: left, y: rows.length * step + 20 }, "bar: 95 % of the samples, line: median, ● prediction, ◇ reference"));
  return chart;
}

const HEADS = { modality: "modality", primary: "segmentor", region: "region", auxiliary: "heard from", label: "label", channel: "channel",
  volume_ml: "volume (ml)", volume_without_ml: "without (ml)", changed: "changed", Dice: "Dice", Dice_without: "Dice without",
  weight: "share", uncertainty: "uncertainty", share: "share" };
const TITLES = { contributions: "Each modality left out", complementary_weights: "Complementary information heard",
  uncertainty: "Uncertainty of each modality (random network prediction)", attribution: "Attribution" };

function contributionTables(rows) {
  if (!rows?.length) return [paragraph("No explanation of this case: nnunet-multimodal explain writes one.")];
  const groups = Map.groupBy ? Map.groupBy(rows, (row) => `${row.table}\n${row.from}`) : rows.reduce((found, row) => {
    const name = `${row.table}\n${row.from}`;
    return found.set(name, [...(found.get(name) ?? []), row]);
  }, new Map());
  return [...groups.entries()].map(([name, group]) => {
    const [kind, from] = name.split("\n");
    const element = document.createElement("table");
    element.createCaption().textContent = `${TITLES[kind] ?? kind} (${from})`;
    const columns = Object.keys(HEADS).filter((column) => column in group[0]);
    const head = element.createTHead().insertRow();
    for (const column of columns) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = HEADS[column];
      if (group.some((row) => row[column] !== "" && !Number.isNaN(Number(row[column])))) cell.className = "n";
      head.append(cell);
    }
    const body = element.createTBody();
    for (const row of group) {
      const line = body.insertRow();
      for (const column of columns) {
        const cell = line.insertCell();
        const value = row[column] === "" ? NaN : Number(row[column]);
        cell.textContent = Number.isNaN(value) ? row[column] || "–" : value.toFixed(3);
        if (!Number.isNaN(value)) cell.className = "n";
      }
    }
    return element;
  });
}

function describe() {
  const own = data.cases[state.view.case];
  const absent = own.runs[state.run]?.absent ?? [];
  byId("view-title").textContent = `${state.view.case}, ${state.run}` + (absent.length ? `, without ${absent.join(", ")}` : "");
  byId("volume-chart").replaceChildren(volumeChart(own.runs[state.run]));
  byId("contribution-table").replaceChildren(...contributionTables(own.explained));
  for (const row of table?.tBodies[0].rows ?? []) {
    row.classList.toggle("chosen", row.dataset.case === state.view.case && row.dataset.run === state.run);
  }
}

// ---- table of cases -------------------------------------------------------------------------------------------
const table = byId("case-table");
if (table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b, numeric) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true }));
  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const numeric = rows.some((row) => row.cells[column].dataset.value !== undefined);
      rows.sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return ascending ? compare(x, y, numeric) : compare(y, x, numeric);
      });
      body.append(...rows);
    });
  });
  const filter = () => {
    const text = byId("filter-text").value.trim().toLowerCase();
    const [run, label] = [byId("filter-run").value, byId("filter-label").value];
    const most = byId("filter-dice").valueAsNumber;
    let count = 0;
    for (const row of rows) {
      const dice = row.querySelector("[data-dice]")?.dataset.value ?? "";
      row.hidden = !(row.dataset.case.toLowerCase().includes(text) && (!run || row.dataset.run === run) &&
        (!label || row.dataset.label === label) && (Number.isNaN(most) || (dice !== "" && Number(dice) <= most)));
      count += !row.hidden;
    }
    byId("case-count").textContent = `${count} of ${rows.length} rows`;
  };
  const form = byId("case-filter");
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  body.addEventListener("click", (event) => {
    const row = event.target.closest("button.show")?.closest("tr");
    if (row) choose(row.dataset.case, row.dataset.run);
  });
}
