// Volumes, agreement with raters and contributions of the chosen case, and the table of all cases.
// ---- the chosen case --------------------------------------------------------------------------------------------
function svg(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function paragraph(text) {
  const element = document.createElement("p");
  element.className = "none";
  element.textContent = text;
  return element;
}

const known = (value) => typeof value === "number" && Number.isFinite(value);
const fixed = (value, digits) => (known(value) ? value.toFixed(digits) : "–");

// A table that scrolls in its own box; heads: text, and whether it is of numbers; cells: text or an element.
function tableOf(caption, heads, rows) {
  const element = document.createElement("table");
  const head = element.createTHead().insertRow();
  const cell = (name, content, numeric) => {
    const own = document.createElement(name);
    own.className = numeric ? "n" : "";
    own.append(content);
    return own;
  };
  for (const [text, numeric] of heads) head.append(Object.assign(cell("th", text, numeric), { scope: "col" }));
  const body = element.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    line.append(...row.map((content, i) => cell(i ? "td" : "th", content, heads[i][1])));
    line.firstChild.scope = "row";
  }
  const [figure, text, box] = ["figure", "figcaption", "div"].map((name) => document.createElement(name));
  for (const [name, value] of [["class", "scroll"], ["role", "region"], ["tabindex", "0"], ["aria-label", caption]]) {
    box.setAttribute(name, value);
  }
  figure.className = "table";
  text.textContent = caption;
  box.append(element);
  figure.append(text, box);
  return figure;
}

// ---- volumes ------------------------------------------------------------------------------------------------------
function volumePicture(v, sampled, reference, raters, most) {
  const [left, width, y] = [8, 230, 12];
  const x = (value) => left + (value / most) * width;
  const chart = svg("svg", { class: "interval", viewBox: `0 0 ${width + 2 * left} 24`, width: width + 2 * left, "aria-hidden": "true" });
  if (sampled) {
    chart.append(svg("line", { x1: x(v["p2.5"]), x2: x(v["p97.5"]), y1: y, y2: y, stroke: "#56b4e9", "stroke-width": 7 }),
      svg("line", { x1: x(v.p50), x2: x(v.p50), y1: y - 6, y2: y + 6, stroke: "#0072b2", "stroke-width": 2 }));
  }
  if (known(v.prediction)) chart.append(svg("circle", { cx: x(v.prediction), cy: y, r: 5, fill: "#d55e00", stroke: "#fff" }));
  for (const own of raters.filter(known)) chart.append(svg("circle", { cx: x(own), cy: y, r: 3.5, fill: "none", stroke: "#000", "stroke-width": 1.5 }));
  if (known(reference)) {
    chart.append(svg("path", { d: `M ${x(reference)} ${y - 7} l 6 7 l -6 7 l -6 -7 z`, fill: "none", stroke: "#000", "stroke-width": 2 }));
  }
  return chart;
}

function dash(why) {
  return Object.assign(document.createElement("span"), { textContent: "–", title: why });
}

function volumeTable(own, names) {
  const [key, digits] = data.unit === "ml" ? ["volume_ml", 1] : ["voxels", 0];
  const rows = Object.entries(own?.labels ?? {}).filter(([, label]) => label[key]);
  if (!rows.length) return paragraph("No volumes of this case: nnunet-multimodal predict writes them (CASE.json).");
  const ratersOf = (name) => own.raters[name] ?? [];
  const most = Math.max(1e-9, ...rows.flatMap(([name, label]) =>
    [label[key]["p97.5"], label[key].prediction, own.references[name] ?? 0, ...ratersOf(name).filter(known)]));
  const rated = rows.some(([name]) => ratersOf(name).length);
  const heads = [["label"], ["0 to " + fixed(most, digits)], ["prediction", true], ["samples, median", true], ["95 % of samples", true],
    ["reference", true], ...(rated ? [[`raters ${names.join(", ")}`, true]] : []), ["lesions", true]];
  return tableOf(`Volumes in ${data.unit}; bar: 95 % of the samples, line: median, ● prediction, ◇ reference${rated ? ", ○ raters" : ""}.`,
    heads, rows.map(([name, label]) => {
      const v = label[key];
      const sampled = !own.no_interval[name];
      return [name, volumePicture(v, sampled, own.references[name], ratersOf(name), most), fixed(v.prediction, digits),
        sampled ? fixed(v.p50, digits) : "–", sampled ? `${fixed(v["p2.5"], digits)} to ${fixed(v["p97.5"], digits)}` : dash(own.no_interval[name]),
        fixed(own.references[name], digits), ...(rated ? [ratersOf(name).map((value) => fixed(value, digits)).join(", ")] : []),
        fixed(label.lesion_count?.prediction, 0)];
    }));
}

function agreementTables({ distribution, agreement }) {
  const tables = [];
  const numbers = (values) => values.map((value) => fixed(value, 3));
  if (distribution) {
    tables.push(tableOf("Samples and prediction against the raters (or the reference), as explained below the means over the cases.",
      [["label"], ...distribution.columns.map((name) => [name, true])], distribution.rows.map(([name, values]) => [name, ...numbers(values)])));
  }
  if (agreement) {
    tables.push(tableOf("Agreement with every rater, Dice.", [["label"], ["rater"], ...agreement.columns.map((name) => [name, true])],
      agreement.rows.map(([name, rater, values]) => [name, rater, ...numbers(values)])));
  }
  const none = "No measures of samples or raters of this case: nnunet-multimodal evaluate --raters writes them.";
  return tables.length ? tables : [paragraph(none)];
}

// ---- contributions --------------------------------------------------------------------------------------------------
const HEADS = { modality: "modality", primary: "segmentor", region: "region", auxiliary: "heard from", label: "label", channel: "channel",
  volume_ml: "volume (ml)", volume_without_ml: "without (ml)", changed: "changed", Dice: "Dice", Dice_without: "Dice without",
  weight: "share", uncertainty: "uncertainty", share: "share" };
const NAMES = ["modality", "primary", "region", "auxiliary", "label", "channel"]; // which may be numbers
const TITLES = { contributions: "Each modality left out", complementary_weights: "Complementary information heard",
  uncertainty: "Uncertainty of each modality (random network prediction)", attribution: "Attribution" };

function contributionTables(rows) {
  if (!rows?.length) return [paragraph("No explanation of this case: nnunet-multimodal explain writes one.")];
  const groups = new Map();
  for (const row of rows) {
    const name = JSON.stringify([row.table, row.from]);
    groups.set(name, [...(groups.get(name) ?? []), row]);
  }
  return [...groups.entries()].map(([name, group]) => {
    const [kind, from] = JSON.parse(name);
    const columns = Object.keys(HEADS).filter((column) => column in group[0]);
    const text = (row, column) => (NAMES.includes(column) ? row[column] : fixed(row[column] ? Number(row[column]) : NaN, 3));
    return tableOf(`${TITLES[kind] ?? kind} (${from})`, columns.map((column) => [HEADS[column], !NAMES.includes(column)]),
      group.map((row) => columns.map((column) => text(row, column) || "–")));
  });
}

function describe() {
  const own = data.cases[state.view.case];
  const run = own.runs[state.run];
  byId("view-title").textContent = `${state.view.case}, ${state.run}` + (run.absent.length ? `, without ${run.absent.join(", ")}` : "");
  byId("volume-chart").replaceChildren(volumeTable(run, state.view.raters));
  byId("agreement-table").replaceChildren(...agreementTables(run));
  byId("contribution-table").replaceChildren(...contributionTables(own.explained));
  for (const row of table?.tBodies[0].rows ?? []) {
    const chosen = row.dataset.case === state.view.case && row.dataset.run === state.run;
    row.classList.toggle("chosen", chosen);
    row.setAttribute("aria-current", chosen);
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
  filter(); // a browser may have kept what was typed before the page was loaded again
  body.addEventListener("click", (event) => {
    const row = event.target.closest("button.show")?.closest("tr");
    if (row) choose(Number(event.target.closest("button").dataset.view), row.dataset.run);
  });
}
