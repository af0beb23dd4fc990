// The review page: a list of cases, NiiVue as viewer and brush, and one request for every decision.
import { Niivue } from "./niivue.js";

const MULTIPLANAR = 3;
const REFRESH_SECONDS = 5;
const $ = (id) => document.getElementById(id);
const state = { cases: [], current: null, offer: null, edited: false, typed: false, opacity: 0.5, busy: false, asked: 0, opened: 0 };
let viewer = null;

// Talking to the server.

async function ask(path, options = {}) {
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  const text = await answer.text();
  let reason = text;
  try { reason = JSON.parse(text).error; } catch { /* a plain sentence */ }
  throw new Error(reason);
}

const casePath = (name, rest) => `/api/cases/${encodeURIComponent(name)}/${rest}`;
const seen = () => state.current?.review?.time ?? null;
const seenQuery = () => (seen() === null ? "" : `seen=${encodeURIComponent(seen())}`);

function say(text, bad = false) {
  $("message").textContent = text;
  $("message").className = bad ? "bad" : "";
}

// Only one request that changes something at a time; its buttons wait.
async function attempt(what, action) {
  if (state.busy) return;
  state.busy = true;
  document.body.setAttribute("aria-busy", "true");
  say(what);
  try {
    say((await action()) ?? "");
    return;
  } catch (error) {
    say(error.message, true);
  } finally {
    state.busy = false;
    document.body.setAttribute("aria-busy", "false");
  }
  // After a refusal the list may be out of date; what is clicked meanwhile counts.
  await refresh().catch(() => {});
}

// The list.

async function refresh() {
  const asked = ++state.asked;
  const dataset = await (await ask("/api/dataset")).json();
  // An answer that a later one has overtaken is out of date.
  if (asked !== state.asked) return;
  state.dataset = dataset;
  state.cases = dataset.cases;
  $("dataset").textContent = document.title = dataset.name;
  const decided = dataset.cases.filter((c) => c.review?.decision).length;
  $("counts").textContent = `round ${dataset.round}, ${dataset.cases.length} cases, ${decided} with a decision`;
  $("score-name").textContent = dataset.cases.some((c) => c.estimated) ? "est. Dice" : "consensus";
  if (state.current) state.current = state.cases.find((c) => c.name === state.current.name) ?? state.current;
  showList();
  showDecision();
}

function shown() {
  const filters = {
    all: () => true,
    open: (c) => !c.review?.decision && c.status !== "annotated",
    flagged: (c) => c.review?.flag,
    decided: (c) => c.review?.decision,
  };
  return state.cases.filter(filters[$("filter").value]);
}

function showList() {
  const rows = shown().map((item) => {
    const row = document.createElement("tr");
    row.className = item.status;
    row.dataset.case = item.name;
    row.setAttribute("aria-selected", String(item.name === state.current?.name));
    const score = item.score === null ? "" : item.score.toFixed(3);
    const marks = (item.review?.flag ? "⚑" : "") + (item.review?.comment ? "✎" : "");
    for (const text of [item.name, item.status, score, marks]) row.insertCell().textContent = text;
    row.cells[1].title = state.dataset.statuses[item.status];
    row.cells[2].className = "score";
    row.addEventListener("click", () => open(item.name));
    return row;
  });
  $("cases").replaceChildren(...rows);
}

function showDecision() {
  const item = state.current;
  if (!item) return;
  $("case-name").textContent = item.name;
  $("flag").textContent = item.review?.flag ? "remove flag" : "flag";
  if (!state.typed) $("comment").value = item.review?.comment ?? "";
  const human = item.status === "annotated";
  for (const id of ["accept", "reject", "save", "carry", "brush", "checkout", "checkin", "upload"]) $(id).disabled = human;
  $("reject").disabled ||= item.status === "sparse";
  $("accept").disabled ||= item.status === "failed";
  $("undo").disabled = !item.review?.decision;
  const sentences = [`${item.status}: ${state.dataset.statuses[item.status]}`, item.reason];
  if (item.review) sentences.push(`last written ${new Date(item.review.time).toLocaleString()}`);
  $("reason").textContent = sentences.filter(Boolean).join(" · ");
}

// A case in the viewer.

async function open(name) {
  if (state.edited && !window.confirm("Discard the changes to this label?")) return;
  const turn = ++state.opened;
  Object.assign(state, { current: state.cases.find((c) => c.name === name), offer: null, edited: false, typed: false });
  $("files").hidden = true;
  say("");
  showList();
  showDecision();
  document.querySelector('tr[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
  if (!viewer) {
    $("sheet").src = casePath(name, "sheet.jpg");
    return;
  }
  say(`loading ${name} …`);
  try {
    await showVolumes(name, turn);
    if (turn === state.opened) say("");
  } catch (error) {
    if (turn === state.opened) say(error.message, true);
  }
}

async function showVolumes(name, turn) {
  const channel = $("channel").value || 0;
  await viewer.loadVolumes([
    { url: casePath(name, `image.nii.gz?channel=${channel}`), name: "image.nii.gz" },
    { url: casePath(name, "divergence.nii.gz"), name: "divergence.nii.gz", colormap: "divergence", cal_min: 0.5, cal_max: 1, opacity: Number($("divergence").value) },
  ]);
  if (turn !== state.opened) return;
  await showLabel(casePath(name, "label.nii.gz"));
  const flat = viewer.volumes[0].dims[3] === 1;
  $("plane").disabled = flat;
  viewer.setSliceType(flat ? 0 : Number($("plane").value));
  showWindow();
}

async function showLabel(url) {
  viewer.closeDrawing();
  if (!(await viewer.loadDrawingFromUrl(url))) throw new Error("expected a label on the image's grid, found another; reload");
  viewer.setDrawOpacity(state.opacity);
  state.edited = false;
}

function showWindow() {
  const image = viewer.volumes[0];
  $("low").value = Number(image.cal_min.toPrecision(5));
  $("high").value = Number(image.cal_max.toPrecision(5));
}

function setWindow() {
  const [low, high] = [Number($("low").value), Number($("high").value)];
  if (!viewer || !(high > low)) return;
  Object.assign(viewer.volumes[0], { cal_min: low, cal_max: high });
  viewer.updateGLVolume();
}

async function drawing() {
  const bytes = await viewer.saveImage({ filename: "", isSaveDrawing: true });
  return new Blob([bytes]);
}

// Decisions and corrections.

const decide = (action) => attempt(`${action} …`, async () => {
  if (state.edited && action === "accept") throw new Error("the label was changed: save it as corrected, or discard the changes");
  const comment = $("comment").value;
  const body = JSON.stringify({ action, comment, seen: seen() });
  await ask(casePath(state.current.name, "decision"), { method: "POST", headers: { "Content-Type": "application/json" }, body });
  // What was typed while it was being written is still to be kept.
  if ($("comment").value === comment) state.typed = false;
  await refresh();
  if (viewer && ["accept", "reject", "undo"].includes(action)) await reload();
  return action === "comment" ? "comment kept" : `${action}: written`;
});

const reload = async () => {
  state.offer = null;
  await showVolumes(state.current.name, state.opened);
};

const corrected = async (request) => {
  await request;
  await refresh();
  if (viewer) await reload();
  return "corrected: written";
};

const save = () => attempt("saving …", async () => {
  const body = await drawing();
  return corrected(ask(casePath(state.current.name, `label?name=drawing.nii&${seenQuery()}`), { method: "PUT", body }));
});

const upload = (file) => attempt(`checking ${file.name} …`, () => {
  const query = `name=${encodeURIComponent(file.name)}&${seenQuery()}`;
  return corrected(ask(casePath(state.current.name, `label?${query}`), { method: "PUT", body: file }));
});

const carry = () => attempt("SAM2 is carrying the correction …", async () => {
  const query = new URLSearchParams({ offer: state.offer ?? "", reach: $("reach").value });
  const answer = await ask(casePath(state.current.name, `carry?${query}`), { method: "POST", body: await drawing() });
  const url = URL.createObjectURL(await answer.blob());
  try {
    await showLabel(`${url}#carried.nii.gz`);
  } finally {
    URL.revokeObjectURL(url);
  }
  state.offer = answer.headers.get("X-Offer");
  state.edited = true;
  return `${answer.headers.get("X-Carried")}; look at it, correct more slices and carry again, or save`;
});

const checkOut = () => attempt("writing files …", async () => {
  const files = await (await ask(casePath(state.current.name, "checkout"), { method: "POST" })).json();
  const lines = [["ITK-SNAP", files.command], ["images", files.images.join("\n")], ["label", files.label]];
  if (files.segmentation) lines.push(["3D Slicer", files.segmentation]);
  $("paths").replaceChildren(...lines.flatMap(([term, text]) => {
    const pair = [document.createElement("dt"), document.createElement("dd")];
    [pair[0].textContent, pair[1].textContent] = [term, text];
    return pair;
  }));
  $("paths").append(...["image.nii.gz", "label.nii.gz"].map((file) => {
    const entry = document.createElement("dd"), link = document.createElement("a");
    Object.assign(link, { href: casePath(state.current.name, file), download: `${state.current.name}_${file}`, textContent: `download ${file}` });
    entry.append(link);
    return entry;
  }));
  $("files").hidden = false;
  $("files").open = true;
  return "open the label, correct it, save it under the same name, then take it back";
});

const checkIn = () => attempt("checking the saved label …", () =>
  corrected(ask(casePath(state.current.name, `checkin?${seenQuery()}`), { method: "POST" })));

// Controls.

function step(by) {
  const names = shown().map((c) => c.name);
  const at = names.indexOf(state.current?.name);
  const next = names[Math.min(Math.max(at + by, 0), names.length - 1)];
  if (next && next !== state.current?.name) open(next);
}

function setOpacity(value) {
  state.opacity = Math.min(Math.max(value, 0), 1);
  $("opacity").value = state.opacity;
  viewer?.setDrawOpacity(state.opacity);
}

function setPen() {
  if (!viewer) return;
  viewer.opts.penSize = Number($("pen-size").value) || 1;
  viewer.setPenValue(Number($("pen").value), $("filled").checked);
  viewer.setDrawingEnabled($("brush").checked);
}

function moveSlice(by) {
  if (!viewer?.volumes.length) return;
  // Across the plane that is shown alone, else across axial slices.
  const across = { 1: [0, by, 0], 2: [by, 0, 0] }[viewer.opts.sliceType] ?? [0, 0, by];
  viewer.moveCrosshairInVox(...across);
}

function nextView() {
  $("plane").value = String((Number($("plane").value) + 1) % (MULTIPLANAR + 1));
  $("plane").dispatchEvent(new Event("change"));
}

const KEYS = {
  j: () => step(1), k: () => step(-1), a: () => decide("accept"), r: () => decide("reject"), f: () => $("flag").click(),
  u: () => decide("undo"), c: () => $("comment").focus(), v: nextView, ArrowUp: () => moveSlice(1), ArrowDown: () => moveSlice(-1),
  "[": () => setOpacity(state.opacity - 0.1), "]": () => setOpacity(state.opacity + 0.1), b: () => $("brush").click(),
  " ": () => viewer?.setDrawOpacity(viewer.drawOpacity > 0 ? 0 : state.opacity),
};

function onKey(event) {
  const typing = event.target.matches("input:not([type=range]):not([type=checkbox]), select, textarea");
  if (event.key === "Escape") event.target.blur();
  if (typing || event.altKey || event.metaKey || !state.current) return;
  if (event.ctrlKey) {
    if (event.key === "z") viewer?.drawUndo();
    return;
  }
  if (/^[0-9]$/.test(event.key) && $("pen").querySelector(`option[value="${event.key}"]`)) {
    $("pen").value = event.key;
    setPen();
  } else if (KEYS[event.key]) {
    event.preventDefault();
    event.stopPropagation();
    KEYS[event.key]();
  }
}

function connect() {
  const clicks = {
    accept: () => decide("accept"), reject: () => decide("reject"), undo: () => decide("undo"), "keep-comment": () => decide("comment"),
    flag: () => decide(state.current.review?.flag ? "unflag" : "flag"), save, carry, checkout: checkOut, checkin: checkIn,
    "pen-undo": () => viewer?.drawUndo(), revert: () => attempt("loading …", reload),
  };
  for (const [id, action] of Object.entries(clicks)) $(id).addEventListener("click", () => state.current && action());
  for (const id of ["brush", "pen", "pen-size", "filled"]) $(id).addEventListener("change", setPen);
  for (const id of ["low", "high"]) $(id).addEventListener("change", setWindow);
  $("filter").addEventListener("change", showList);
  $("comment").addEventListener("input", () => { state.typed = true; });
  $("opacity").addEventListener("input", () => setOpacity(Number($("opacity").value)));
  $("divergence").addEventListener("input", () => viewer?.setOpacity(1, Number($("divergence").value)));
  $("plane").addEventListener("change", () => viewer?.setSliceType(Number($("plane").value)));
  $("channel").addEventListener("change", () => state.current && open(state.current.name));
  $("upload").addEventListener("change", () => {
    if ($("upload").files.length && state.current) upload($("upload").files[0]).then(() => { $("upload").value = ""; });
  });
  // Before NiiVue, which has keys of its own.
  document.addEventListener("keydown", onKey, { capture: true });
  window.addEventListener("beforeunload", (event) => state.edited && event.preventDefault());
}

// Beginning.

function colors() {
  const classes = state.dataset.classes;
  const count = Math.max(...classes.map((c) => c.value)) + 1;
  const map = { R: Array(count).fill(0), G: Array(count).fill(0), B: Array(count).fill(0), A: Array(count).fill(0), labels: Array(count).fill("") };
  for (const { value, name, color } of classes) {
    [map.R[value], map.G[value], map.B[value]] = color;
    map.A[value] = 255;
    map.labels[value] = name;
  }
  return map;
}

function legend() {
  const { classes, divergence_color: divergence, divergence_meaning: meaning } = state.dataset;
  const entries = [...classes.map((c) => [c.color, `${c.value} ${c.name}`]), [divergence, `divergence: ${meaning}`]];
  $("legend").replaceChildren(...entries.map(([color, text]) => {
    const item = document.createElement("span"), key = document.createElement("span");
    key.className = "key";
    key.style.background = `rgb(${color})`;
    item.append(key, text);
    return item;
  }));
  const pens = [[0, "eraser"], ...classes.map((c) => [c.value, `${c.value} ${c.name}`])];
  $("pen").replaceChildren(...pens.map(([value, text]) => new Option(text, value, value === 1, value === 1)));
  $("channel").replaceChildren(...state.dataset.channels.map((name, index) => new Option(name, index)));
  $("channel-box").hidden = state.dataset.channels.length < 2;
}

async function makeViewer() {
  const made = new Niivue({
    isRadiologicalConvention: true, dragAndDropEnabled: false, multiplanarShowRender: 0, isNearestInterpolation: true, show3Dcrosshair: false,
    // In percent of the image: a line as wide as a voxel would hide what is judged.
    crosshairWidth: 0.4, crosshairWidthUnit: "percent", crosshairColor: [0.4, 0.7, 1, 0.6],
    // As the report hangs them: the front at the left of sagittal slices.
    sagittalNoseLeft: true, multiplanarPadPixels: 16, showAllOrientationMarkers: true, fontColor: [1, 1, 1, 1], fontMinPx: 16, logLevel: "error", viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "", loadingText: "",
  });
  await made.attachToCanvas($("canvas"));
  const [r, g, b] = state.dataset.divergence_color;
  made.addColormap("divergence", { R: [0, r, r], G: [0, g, g], B: [0, b, b], A: [0, 255, 255], I: [0, 1, 255] });
  made.setDrawColormap(colors());
  made.onLocationChange = (place) => { $("place").textContent = place.vox ? `voxel ${place.vox.map((v) => Math.round(v) + 1).join(", ")}` : ""; };
  made.onDrawingChanged = (action) => { if (action !== "load" && action !== "close") state.edited = true; };
  made.onIntensityChange = showWindow;
  return made;
}

async function begin() {
  await refresh();
  legend();
  connect();
  if (document.createElement("canvas").getContext("webgl2")) {
    viewer = await makeViewer();
    setPen();
  } else {
    $("canvas").hidden = true;
    $("sheet").hidden = false;
    for (const id of ["toolbar", "brush-bar"]) $(id).querySelectorAll("input, select, button").forEach((control) => { control.disabled = true; });
  }
  const first = shown().find((c) => c.status !== "annotated") ?? shown()[0];
  if (first) await open(first.name);
  if (!viewer) say("This browser has no WebGL 2: pictures instead of the viewer; decisions and files work.", true);
  setInterval(() => { if (!document.hidden && !state.busy) refresh().catch((error) => say(error.message, true)); }, REFRESH_SECONDS * 1000);
  document.body.dataset.ready = "true";
}

begin().catch((error) => say(error.message, true));
