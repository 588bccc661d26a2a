"use strict";
// What the page draws lies in #data, the plotting library packed in #library; nothing is loaded.
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const OPTIONS = {
  responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};
// Okabe and Ito's colours, which colour-blind people can tell apart, as they do on light and on dark.
const RANKS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#b3a500"];
const HEAT = {
  light: [[0, "#f2f5fa"], [0.35, "#b9d3f5"], [0.65, "#5b93e6"], [0.85, "#2450a8"], [1, "#14224f"]],
  dark: [[0, "#161d29"], [0.35, "#1f4373"], [0.65, "#3f8ad8"], [0.85, "#9fd0ff"], [1, "#fff3d6"]],
};

// -- colours -----------------------------------------------------------------------------------------------------

const THEMES = { auto: "Colours: system", light: "Colours: light", dark: "Colours: dark" };
const system = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";
try { theme = localStorage.getItem("logsync-theme") || "auto"; } catch { /* a file's page may have no storage */ }
if (!(theme in THEMES)) theme = "auto";

const isDark = () => theme === "dark" || (theme === "auto" && system.matches);
const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

function applyTheme() {
  root.classList.toggle("dark", isDark());
  byId("theme").textContent = THEMES[theme];
  redraw();
}

byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  try { localStorage.setItem("logsync-theme", theme); } catch { /* as above */ }
  applyTheme();
});
system.addEventListener("change", applyTheme);

// -- what is common to all plots ---------------------------------------------------------------------------------

function layout(more) {
  const axis = () => ({
    gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true,
    tickfont: { color: colour("faint"), size: 11 }, title: { font: { color: colour("faint"), size: 12 }, standoff: 8 },
  });
  const made = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: colour("text"), size: 12 },
    margin: { l: 56, r: 16, t: 10, b: 44 }, hovermode: "x unified",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("faint"), activecolor: colour("main") },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("text") }, namelength: -1 },
    legend: { orientation: "h", x: 0, y: 1, yref: "container", yanchor: "top", traceorder: "normal", font: { size: 11 } },
    xaxis: axis(), yaxis: axis(), shapes: [], annotations: [],
  };
  return more(made) || made;
}

// Restarts are lines, and every attempt has its name above the plot, where it hides nothing.
function markAttempts(made, onTime) {
  const labelled = data.attempts.length <= 12;
  data.attempts.forEach((attempt, at) => {
    const x = onTime ? attempt.time : attempt.step;
    if (x === null) return;
    if (at > 0) {
      made.shapes.push({
        type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1,
        line: { color: colour("attempt"), width: 1.5, dash: "dash" },
      });
    }
    if (labelled) {
      made.annotations.push({
        xref: "x", yref: "paper", x, y: 1, xanchor: "left", yanchor: "bottom", showarrow: false,
        text: `${at > 0 ? "\u21bb " : ""}attempt ${attempt.attempt}`, font: { size: 11, color: colour("attempt") },
      });
    }
  });
  if (data.attempts.length) made.margin.t += 16;
}

// -- metrics -----------------------------------------------------------------------------------------------------

let axis = "step";
let logarithmic = false;
const cards = [];
const drawn = new Set();

function trace(points, more) {
  const few = points.y.length <= 80;
  return {
    type: "scatter", mode: few && more.dots !== false ? "lines+markers" : "lines", marker: { size: 5 },
    x: data.places[points.at][axis], y: points.y, connectgaps: false, ...more,
  };
}

function tracesOf(metric) {
  const found = [];
  const value = "%{y:.6~g}";
  if (metric.low) {
    const hoverinfo = metric.ranks && metric.ranks.length ? "skip" : undefined;  // each rank tells its own
    const edge = { color: colour("edge"), width: 0.6 };
    found.push(trace(metric.low, {
      name: "lowest rank", line: edge, showlegend: false, dots: false, hoverinfo,
      hovertemplate: hoverinfo ? "" : `${value}<extra>lowest rank</extra>`,
    }));
    const by = metric.high.rank ? "highest: rank %{customdata}" : "highest rank";
    found.push(trace(metric.high, {
      name: "range of ranks", line: edge, fill: "tonexty", fillcolor: colour("band"), dots: false,
      customdata: metric.high.rank, hoverinfo, hovertemplate: hoverinfo ? "" : `${value}<extra>${by}</extra>`,
    }));
  }
  if (metric.peaks) {
    found.push(trace(metric.peaks, {
      name: "lowest, highest", line: { color: colour("edge"), width: 0.8 }, showlegend: !metric.low, dots: false,
      hoverinfo: "skip",
    }));
  }
  (metric.ranks || []).forEach((points, at) => {
    found.push(trace(points, {
      name: `rank ${points.rank}`, line: { color: RANKS[at % RANKS.length], width: 1.1 }, opacity: 0.9, dots: false,
      hovertemplate: `${value}<extra>rank ${points.rank}</extra>`,
    }));
  });
  found.push(trace(metric.merged, {
    name: metric.label || "all ranks", legendrank: 1, line: { color: colour("main"), width: 2 },
    marker: { color: colour("main"), size: 5 },
    hovertemplate: `<b>${value}</b><extra>${metric.label || "all ranks"}</extra>`,
  }));
  if (metric.bad) {
    found.push({
      type: "scatter", mode: "markers", name: "not finite", yaxis: "y2", showlegend: true,
      x: metric.bad[axis], y: metric.bad.step.map(() => 0.03),
      marker: { symbol: "x-thin", size: 9, line: { color: colour("bad"), width: 2 } },
      text: metric.bad.text, hovertemplate: "%{text}<extra></extra>",
    });
  }
  return found;
}

function draw(card) {
  const metric = card.metric;
  const traces = tracesOf(metric);
  const made = layout((made) => {
    made.xaxis.title.text = axis === "time" ? "time (UTC)" : data.step_title;
    if (axis === "time") made.xaxis.type = "date";
    made.yaxis.title.text = metric.unit;
    made.yaxis.tickformat = "~g";
    made.yaxis.exponentformat = "SI";
    if (logarithmic) { made.yaxis.type = "log"; made.yaxis.dtick = undefined; }
    if (metric.bad) made.yaxis2 = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
    const [first, last] = data.range[axis];
    if (first < last) made.xaxis.range = [first - 0.01 * (last - first), last + 0.01 * (last - first)];
    made.showlegend = traces.length > 1;
    const entries = traces.filter((each) => each.showlegend !== false).length;
    if (made.showlegend) made.margin.t += 22 * Math.ceil(entries / 4);
    card.plot.style.height = `${250 + made.margin.t}px`;
    markAttempts(made, axis === "time");
  });
  Plotly.react(card.plot, traces, made, OPTIONS);
  drawn.add(card);
}

function makeCard(metric) {
  const box = document.createElement("article");
  box.className = "card";
  const heading = document.createElement("h3");
  const name = document.createElement("b");
  name.textContent = metric.name;
  const last = document.createElement("span");
  last.textContent = `last ${metric.last}`;
  heading.append(name, last);
  const plot = document.createElement("div");
  plot.className = "plot";
  box.append(heading, plot);
  const card = { metric, box, plot };
  box.card = card;
  return card;
}

// Only what is near the window is drawn: there may be thousands.
const watcher = new IntersectionObserver((changes) => {
  for (const { target, isIntersecting } of changes) {
    const card = target.card;
    if (isIntersecting && !drawn.has(card)) draw(card);
    if (!isIntersecting && drawn.has(card)) { Plotly.purge(card.plot); drawn.delete(card); }
  }
}, { rootMargin: "600px" });

function filterCards() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const fits = words.every((word) => card.metric.name.toLowerCase().includes(word));
    card.box.hidden = !fits;
    card.box.style.display = fits ? "" : "none";
    shown += fits;
  }
  byId("count").textContent = shown === cards.length ? `${shown}` : `${shown} of ${cards.length}`;
}

// -- waits -------------------------------------------------------------------------------------------------------

function seconds(ms) {
  return ms < 1000 ? `${ms} ms` : `${Number((ms / 1000).toPrecision(3))} s`;
}

function drawHeat() {
  const heat = data.heat;
  byId("heat").hidden = !heat;
  if (!heat) return;
  const box = byId("heatmap");
  box.style.height = `${Math.max(230, Math.min(760, 110 + 22 * heat.rows.length))}px`;
  // Waits go from milliseconds to minutes, so colours follow their logarithm.
  const z = heat.waits.map((row) => row.map((ms) => (ms === null ? null : Math.log10(Math.max(ms, 1)))));
  const text = heat.waits.map((row) => row.map((ms, column) => (ms === null ? "" : `${seconds(ms)}${heat.slowest[column]}`)));
  const most = Math.max(2, ...z.map((row) => row.reduce((a, b) => (b !== null && b > a ? b : a), 0)));
  const ticks = [0, 1, 2, 3, 4, 5, 6, 7, 8].filter((power) => power <= most + 0.3);
  const made = layout((made) => {
    made.hovermode = "closest";
    made.xaxis.type = "date";
    made.xaxis.title.text = "time (UTC)";
    made.xaxis.showgrid = false;
    made.yaxis.showgrid = false;
    made.yaxis.autorange = "reversed";
    made.yaxis.tickvals = heat.ticks;
    made.yaxis.ticktext = heat.ticks.map((row) => heat.rows[row]);
    markAttempts(made, true);
  });
  Plotly.react(box, [{
    type: "heatmap", x: heat.edges, y: heat.rows.map((_, row) => row), z, text, zmin: 0, zmax: most, xgap: 0, ygap: 1,
    colorscale: HEAT[isDark() ? "dark" : "light"], hoverongaps: false,
    customdata: heat.waits.map((row, at) => row.map(() => heat.rows[at])),
    hovertemplate: "<b>%{customdata}</b> waited %{text}<br>%{x}<extra></extra>",
    colorbar: {
      title: { text: "waited", side: "top", font: { size: 12 } }, thickness: 12, outlinewidth: 0,
      tickvals: ticks, ticktext: ticks.map((power) => seconds(10 ** power)),
    },
  }], made, OPTIONS);
}

// -- all of it ---------------------------------------------------------------------------------------------------

function redraw() {
  if (typeof Plotly === "undefined") return;
  for (const card of drawn) draw(card);
  drawHeat();
}

async function unpack(id) {
  const packed = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

async function begin() {
  const library = document.createElement("script");
  library.textContent = await unpack("library");
  document.head.append(library);
  applyTheme();
  byId("title").textContent = data.title;
  for (const [name, value] of data.facts) {
    const pair = document.createElement("div");
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    pair.append(term, text);
    byId("facts").append(pair);
  }
  for (const [kind, text] of data.notes) {
    const item = document.createElement("li");
    item.className = kind;
    item.textContent = text;
    byId("notes").append(item);
  }
  byId("waited").textContent = data.waited;
  for (const metric of data.metrics) cards.push(makeCard(metric));
  byId("cards").append(...cards.map((card) => card.box));
  for (const card of cards) watcher.observe(card.box);
  filterCards();
  drawHeat();
  byId("axis").addEventListener("change", (event) => { axis = event.target.value; redraw(); });
  byId("log").addEventListener("change", (event) => { logarithmic = event.target.checked; redraw(); });
  byId("filter").addEventListener("input", filterCards);
  document.body.dataset.ready = "yes";
}

begin().catch((error) => {
  byId("failed").hidden = false;
  byId("failed").textContent = `This page could not be drawn: ${error}. It needs a browser of 2023 or later.`;
  throw error;
});
