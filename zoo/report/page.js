// The page at work: tables that sort, filter and hide, and plots that follow them. Data comes from the element #data;
// nothing is asked of the network.
(() => {
  "use strict";

  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = new Map(data.rows.map((row) => [row.id, row]));
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const unchecked = new Set(); // rows that the reader has hidden
  const filtered = new Set(); // rows that no filter lets through
  const panels = []; // {chart, panel, div}
  const shown = (id) => !unchecked.has(id) && !filtered.has(id);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // ---- numbers as zoo.report.units writes them

  const short = (v) => (Math.abs(v) >= 999.5 ? v.toFixed(0) : String(Number(v.toPrecision(3))));

  function scaled(v, base, units) {
    let power = 0;
    while (power + 1 < units.length && Math.max(Math.round(v), base === 1000 ? Number(v.toPrecision(3)) : 0) >= base) {
      v /= base;
      power += 1;
    }
    return short(v) + units[power];
  }

  const text = {
    percent: (v) => {
      if (v >= 0.9995 && v < 1) return ">99.9%";
      return v > 0 && v < 0.0005 ? "<0.1%" : `${(100 * v).toFixed(1)}%`;
    },
    duration: (v) => {
      for (const [scale, unit] of [[3600, "h"], [60, "min"]]) {
        if (v >= 2 * scale) return `${(v / scale).toFixed(1).replace(/\.0$/, "")} ${unit}`;
      }
      return `${short(v)} s`;
    },
    count: (v) => {
      if (v >= 10000) return scaled(v, 1000, ["", "k", "M", "G", "T", "P"]);
      return v >= 100 || Number.isInteger(v) ? Math.round(v).toLocaleString("en-US") : short(v);
    },
    size: (v) => scaled(v, 1024, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"]),
    length: (v) => (v >= 1024 && v % 1024 === 0 ? scaled(v, 1024, ["", "K", "M", "G"]) : text.count(v)),
    plain: (v) => String(Number(v.toPrecision(3))),
  };

  // Plotly reads tags and entities in texts: a name is a name.
  const safe = (s) => String(s).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const bare = (s) => s.replace(/<br>/g, ", ").replace(/<[^>]*>/g, "").replace(/&lt;/g, "<").replace(/&gt;/g, ">")
    .replace(/&amp;/g, "&");

  function clipped(label, most) {
    if (label.length <= most) return label;
    const half = Math.floor(most / 2);
    return `${label.slice(0, half - 1)}…${label.slice(-half)}`;
  }

  // ---- plots

  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const pick = (list, look) => list[look % list.length];

  function look(id, n) {
    const row = rows.get(id);
    return {
      colour: colour(`look-${row.look % data.looks.n_colours}`),
      symbol: pick(data.looks.symbols, row.look + row.variant),
      dash: pick(data.looks.dashes, row.look + row.variant),
      name: safe(clipped(row.label, n)),
      label: safe(row.label),
    };
  }

  function paretoFront(points) {
    const front = [];
    for (const [x, y] of [...points].sort((a, b) => a[0] - b[0] || b[1] - a[1])) {
      if (!front.length || y > front.at(-1)[1]) front.push([x, y]);
    }
    return front;
  }

  function frontTrace(series, log) {
    const front = paretoFront(series.map((s) => [s.x[0], s.y[0]]));
    if (!front.length) return [];
    const end = (log ? 1.8 : 1.05) * Math.max(...series.map((s) => s.x[0]));
    const xs = [front[0][0]], ys = [0];
    for (const [x, y] of front) {
      xs.push(x, x);
      ys.push(ys.at(-1), y);
    }
    xs.push(end);
    ys.push(ys.at(-1));
    return [{
      type: "scatter", mode: "lines", x: xs, y: ys, hoverinfo: "skip", showlegend: false, meta: "front",
      line: { color: colour("soft"), width: 1.2, dash: "5px,3px" },
    }];
  }

  // The interval of a curve, below all curves. Arrow keys pass it by, as they do the front.
  function bandTrace(s, id) {
    return {
      type: "scatter", mode: "lines", x: [...s.x, ...[...s.x].reverse()], y: [...s.high, ...[...s.low].reverse()],
      fill: "toself", fillcolor: look(id, 28).colour, opacity: 0.17, line: { width: 0 }, hoverinfo: "skip",
      showlegend: false, meta: "front",
    };
  }

  const MOST_OF_BANDS = 8; // more would hide each other

  function curves(panel, width) {
    const series = panel.series.filter((s) => shown(s.row));
    const bands = panel.band && series.length <= MOST_OF_BANDS ? series.filter((s) => s.low.length).map((s) => bandTrace(s, s.row)) : [];
    const traces = series.map((s) => {
      const l = look(s.row, width < 480 ? 18 : 28);
      const n = s.x.length;
      const step = Math.max(1, Math.floor(n / 8));
      const marked = (i) => panel.kind === "points" || s.notes.length || n < 40 || (n - 1 - i) % step === 0;
      const spread = s.low.length && s.low.some((v, i) => v !== s.high[i]);
      return {
        type: "scatter", mode: panel.kind === "points" ? "markers" : "lines+markers", name: l.name, meta: s.row,
        x: s.x, y: s.y, cliponaxis: false, line: { color: l.colour, dash: l.dash, width: 2 },
        marker: {
          color: l.colour, symbol: s.x.map((_, i) => (s.notes[i] ? `${l.symbol}-open` : l.symbol)),
          size: s.x.map((_, i) => (panel.kind === "points" ? 12 : marked(i) ? 7 : 0)),
          opacity: 1,
          line: { color: s.notes.length ? l.colour : colour("paper"), width: s.notes.length ? 1.5 : 0.8 },
        },
        error_y: spread && !panel.band ? {
          type: "data", symmetric: false, array: s.high.map((v, i) => v - s.y[i]), thickness: 1, width: 3,
          arrayminus: s.low.map((v, i) => s.y[i] - v),
        } : { visible: false },
        customdata: s.x.map((x, i) => [
          `<b>${l.label}</b>`,
          `${safe(panel.y.title)} ${text[panel.y.unit](s.y[i])}` +
            (spread ? ` (${text[panel.y.unit](s.low[i])} to ${text[panel.y.unit](s.high[i])})` : ""),
          `${safe(panel.x.title)} ${text[panel.x.unit](x)}${s.notes[i] ? `<br>${safe(s.notes[i])}` : ""}`,
        ].join("<br>")),
        hovertemplate: "%{customdata}<extra></extra>",
      };
    });
    return [...bands, ...traces, ...(panel.front ? frontTrace(series, panel.x.log) : [])];
  }

  // A mean with its interval for each row, and the single values behind it.
  function dots(panel) {
    const read = text[panel.x.unit];
    return panel.series.filter((s) => shown(s.row)).flatMap((s, i) => {
      const l = look(s.row, 28);
      const spread = s.low.length > 0;
      const said = `<b>${l.label}</b><br>${safe(panel.x.title)} ${read(s.x[0])}` +
        (spread ? ` (${read(s.low[0])} to ${read(s.high[0])})` : "");
      return [{
        type: "scatter", mode: "markers", x: s.each, y: s.each.map(() => i + 0.24), hoverinfo: "skip", showlegend: false,
        meta: "front", marker: { color: l.colour, symbol: "circle-open", size: 7, line: { width: 1.5 } }, cliponaxis: false,
      }, {
        type: "scatter", mode: "markers", name: l.name, meta: s.row, x: s.x, y: [i], showlegend: false, cliponaxis: false,
        marker: { color: l.colour, symbol: l.symbol, size: 12, line: { color: colour("paper"), width: 0.8 } },
        error_x: spread ? {
          type: "data", symmetric: false, array: [s.high[0] - s.x[0]], arrayminus: [s.x[0] - s.low[0]],
          color: l.colour, thickness: 2, width: 5,
        } : { visible: false },
        customdata: [said], hovertemplate: "%{customdata}<extra></extra>",
      }];
    });
  }

  function bars(panel) {
    return panel.series.filter((s) => shown(s.row)).map((s, i) => {
      const l = look(s.row, 28);
      const value = text[panel.x.unit](s.x[0]);
      return {
        type: "bar", orientation: "h", name: l.name, meta: s.row, x: s.x, y: [i], marker: { color: l.colour },
        text: [value], textposition: "outside", cliponaxis: false, width: 0.66, showlegend: false,
        customdata: [`<b>${l.label}</b><br>${safe(panel.x.title)} ${value}`],
        hovertemplate: "%{customdata}<extra></extra>",
      };
    });
  }

  const heatLines = (panel) => panel.lines.map((line, i) => [line, i]).filter(([line]) => panel.row || shown(line));

  // The map of the rows shown, without the columns that only others have.
  function narrowed(panel) {
    const lines = heatLines(panel);
    const kept = panel.columns.map((_, j) => j).filter((j) => lines.some(([, i]) => panel.values[i][j] !== null));
    return {
      ...panel, lines: lines.map(([line]) => line), columns: kept.map((j) => panel.columns[j]),
      values: lines.map(([, i]) => kept.map((j) => panel.values[i][j])),
      trained: panel.trained === null ? null : kept.filter((j) => j < panel.trained).length,
    };
  }

  function heatMap(panel, width) {
    const { lines, values } = panel;
    const names = lines.map((line) => (panel.row ? safe(line) : look(line, 99).label));
    const share = panel.unit === "percent";
    const read = text[panel.unit];
    return [{
      type: "heatmap", x: panel.columns.map((_, j) => j), y: lines.map((_, i) => i), z: values,
      ...(share ? { zmin: 0, zmax: 1 } : {}),
      colorscale: "Cividis", showscale: false, xgap: 1, ygap: 1, hoverongaps: false, meta: panel.row,
      text: values.map((line) => line.map((v) => (v === null ? "" : share ? (100 * v).toFixed(0) : read(v)))),
      texttemplate: panel.columns.length * 30 < width - 90 ? "%{text}" : "",
      customdata: values.map((line, i) => line.map((v, j) => [
        `<b>${panel.row ? `${safe(panel.y.title)} ` : ""}${names[i]}</b>`,
        `${safe(panel.x.title)} ${safe(panel.columns[j])}`, v === null ? "no figure" : read(v),
      ].join("<br>"))),
      hovertemplate: "%{customdata}<extra></extra>",
    }];
  }

  const SECONDS = [0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800, 36000, 108000, 360000];

  function ticks(axis, values, room) {
    const low = Math.min(...values), high = Math.max(...values);
    let at = null;
    if (axis.unit === "percent") at = [0, 0.25, 0.5, 0.75, 1];
    else if (axis.log && axis.unit === "duration") at = SECONDS.filter((s) => s >= low / 2 && s <= high * 2);
    else if (axis.log && (axis.unit === "size" || axis.unit === "length")) {
      const first = Math.floor(Math.log2(low)), n = Math.ceil(Math.log2(high)) - first + 1;
      at = Array.from({ length: n }, (_, k) => 2 ** (first + k));
    } else if (axis.log) {
      const first = Math.floor(Math.log10(low)), n = Math.ceil(Math.log10(high)) - first + 1;
      const steps = n < 5 ? [1, 2, 5] : [1];
      at = Array.from({ length: n }, (_, k) => steps.map((s) => s * 10 ** (first + k))).flat()
        .filter((v) => v >= low / 2 && v <= high * 2);
    }
    if (!at || !at.length || !Number.isFinite(low)) return {};
    const every = Math.ceil(at.length / room);
    at = at.filter((_, i) => i % every === 0);
    return { tickvals: at, ticktext: at.map((v) => (axis.unit === "percent" ? `${100 * v}%` : text[axis.unit](v))) };
  }

  function axisLayout(axis, values, room) {
    return {
      title: { text: safe(axis.title), standoff: 8 }, type: axis.log ? "log" : "linear", automargin: true,
      gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, tickformat: axis.log ? "" : "~s",
      ...ticks(axis, values, room), ...(axis.unit === "percent" ? { range: [-0.02, 1.04] } : {}),
    };
  }

  function place(panel, traces, width) {
    const most = width < 480 ? 14 : 24;
    const base = {
      font: { family: "system-ui, sans-serif", size: 12.5, color: colour("ink") }, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 14, t: touch ? 8 : 32, b: 8 }, uirevision: "kept", hovermode: "closest",
      dragmode: touch ? false : "zoom", showlegend: false,
      hoverlabel: { bgcolor: colour("paper"), bordercolor: colour("soft"), font: { color: colour("ink") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("accent") },
    };
    if (panel.kind === "bars") {
      const longest = Math.max(0, ...traces.map((t) => t.x[0]));
      return {
        ...base, height: 48 + 30 * traces.length,
        xaxis: { range: [0, longest ? 1.3 * longest : 1], showticklabels: false, showgrid: false, zeroline: false },
        yaxis: {
          automargin: true, range: [traces.length - 0.4, -0.6], showgrid: false, zeroline: false,
          tickvals: traces.map((_, i) => i), ticktext: traces.map((t) => look(t.meta, most).name),
        },
      };
    }
    if (panel.kind === "dots") {
      const means = traces.filter((t) => t.meta !== "front");
      const values = traces.flatMap((t) => t.x);
      return {
        ...base, height: 84 + 34 * means.length,
        xaxis: axisLayout(panel.x, values, width < 480 ? 5 : 8),
        yaxis: {
          automargin: true, range: [means.length - 0.4, -0.6], showgrid: false, zeroline: false,
          tickvals: means.map((_, i) => i), ticktext: means.map((t) => look(t.meta, most).name),
        },
        shapes: panel.mark === null ? [] : [{
          type: "line", x0: panel.mark, x1: panel.mark, yref: "paper", y0: 0, y1: 1,
          line: { color: colour("soft"), width: 1.5, dash: "4px,3px" },
        }],
      };
    }
    if (panel.kind === "heat") {
      const within = panel.trained !== null && panel.trained > 0 && panel.trained < panel.columns.length;
      const every = Math.ceil((panel.columns.length * 34) / Math.max(1, width - 110));
      const labelled = panel.columns.map((_, j) => j).filter((j) => j % every === 0);
      return {
        ...base, height: 96 + 28 * panel.lines.length,
        xaxis: {
          title: { text: safe(panel.x.title), standoff: 6 }, automargin: true, showgrid: false, zeroline: false,
          tickvals: labelled, ticktext: labelled.map((j) => safe(clipped(panel.columns[j], 14))),
        },
        yaxis: {
          automargin: true, showgrid: false, zeroline: false, range: [panel.lines.length - 0.5, -0.5],
          title: { text: panel.row ? safe(panel.y.title) : "" }, tickvals: panel.lines.map((_, i) => i),
          ticktext: panel.lines.map((line) => (panel.row ? safe(line) : look(line, most).name)),
        },
        shapes: within ? [{
          type: "line", x0: panel.trained - 0.5, x1: panel.trained - 0.5, yref: "paper", y0: 0, y1: 1,
          line: { color: colour("look-1"), width: 3 },
        }] : [],
      };
    }
    const series = panel.series.filter((s) => shown(s.row));
    const named = traces.filter((t) => t.name && t.meta !== "front");
    const longest = Math.max(1, ...named.map((t) => t.name.length));
    const perLine = Math.max(1, Math.floor((width - 20) / (60 + 7.2 * longest)));
    const legend = named.length <= 8; // more would crowd the plot out: the table is the key
    return {
      ...base, height: 330 + (legend ? 22 * Math.ceil(named.length / perLine) : 0), showlegend: legend,
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, xanchor: "left" },
      xaxis: axisLayout(panel.x, series.flatMap((s) => s.x), width < 480 ? 5 : 8),
      yaxis: axisLayout(panel.y, series.flatMap((s) => s.y), 7),
      shapes: panel.trained === null ? [] : [{
        type: "line", x0: panel.trained, x1: panel.trained, yref: "paper", y0: 0, y1: 1,
        line: { color: colour("soft"), width: 1.5, dash: "4px,3px" },
      }],
    };
  }

  // Whether there is something to see among the rows shown; a setting that they share tells nothing.
  function hasData(panel) {
    if (panel.kind === "heat") return panel.row ? shown(panel.row) : heatLines(panel).length > 0;
    const series = panel.series.filter((s) => shown(s.row));
    return series.length > 0 && (!panel.sweep || new Set(series.map((s) => s.x[0])).size > 1);
  }

  const ZOOMS = ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"];

  const downloads = (div, chart) => ["png", "svg"].map((format) => ({
    name: `as ${format}`, title: `Download as ${format.toUpperCase()}`,
    icon: Plotly.Icons[format === "png" ? "camera" : "disk"],
    click: () => Plotly.downloadImage(div, { format, filename: chart.name }),
  }));

  const MOST_OF_ROWS = 12; // maps that belong to one row each, shown at a time

  function draw() {
    const drawn = new Map();
    for (const { chart, panel, div, figure } of panels) {
      const n = drawn.get(chart) ?? 0;
      figure.hidden = !hasData(panel) || (panel.row !== undefined && panel.row !== "" && n >= MOST_OF_ROWS);
      drawn.set(chart, n + !figure.hidden);
      document.getElementById(chart.name).hidden = !drawn.get(chart);
    }
    for (const { chart, panel, div, figure } of panels) {
      if (figure.hidden || figure.parentElement.parentElement.hidden) continue;
      const width = div.clientWidth || 320;
      const now = panel.kind === "heat" ? narrowed(panel) : panel;
      const traces = { lines: curves, points: curves, bars, dots, heat: heatMap }[panel.kind](now, width);
      Plotly.react(div, traces, place(now, traces, width), {
        responsive: true, displaylogo: false, displayModeBar: !touch, showTips: false,
        showSendToCloud: false, plotlyServerURL: "", // figures stay on this page
        modeBarButtons: [["lines", "points"].includes(panel.kind) ? ZOOMS : [], downloads(div, chart)],
      });
    }
  }

  // A plot by keyboard: left and right from point to point, up and down from row to row; each is read aloud.
  function byKeyboard(div, panel) {
    const at = { curve: 0, point: 0 };
    div.addEventListener("keydown", (event) => {
      if (event.target !== div) return;
      const heat = panel.kind === "heat";
      const single = panel.kind === "bars" || panel.kind === "dots"; // a point for each row
      const traces = div.data.filter((trace) => trace.meta !== "front");
      const n = heat ? traces[0].z.length : traces.length;
      if (!n) return;
      const length = (curve) => (heat ? traces[0].z[curve].length : traces[curve].x.length);
      const move = {
        ArrowRight: () => (single ? (at.curve += 1) : (at.point += 1)),
        ArrowLeft: () => (single ? (at.curve -= 1) : (at.point -= 1)),
        ArrowDown: () => (at.curve += 1), ArrowUp: () => (at.curve -= 1),
        Home: () => (at.point = 0), End: () => (at.point = Infinity),
      }[event.key];
      if (event.key === "Escape") Plotly.Fx.unhover(div);
      if (!move) return;
      event.preventDefault();
      move();
      at.curve = (at.curve + n) % n;
      at.point = Math.min(Math.max(at.point, 0), length(at.curve) - 1);
      Plotly.Fx.hover(div, [heat
        ? { curveNumber: 0, pointNumber: [at.curve, at.point] }
        : { curveNumber: div.data.indexOf(traces[at.curve]), pointNumber: at.point }]);
      const said = heat ? traces[0].customdata[at.curve][at.point] : traces[at.curve].customdata[at.point];
      document.getElementById("live").textContent = bare(said);
    });
    div.addEventListener("blur", () => Plotly.Fx.unhover(div));
  }

  function setUpPlots() {
    for (const chart of data.charts) {
      chart.panels.forEach((panel, i) => {
        const figure = document.getElementById(`${chart.name}-${i}`);
        const div = figure.querySelector(".plot");
        panels.push({ chart, panel, div, figure });
        byKeyboard(div, panel);
      });
    }
    draw();
    for (const { div, panel } of panels) {
      if (panel.kind === "heat" || !div.on) continue;
      div.on("plotly_legendclick", (event) => { // as in the table: a row is hidden everywhere
        check(event.data[event.curveNumber].meta, false);
        return false;
      });
      div.on("plotly_legenddoubleclick", () => false);
    }
  }

  // ---- tables

  const boards = all("table.board").map((table) => ({
    table, body: table.tBodies[0], lines: all("tbody tr", table), section: table.closest("section"),
  }));

  let waiting = false;

  function refresh() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  }

  function check(id, on) {
    if (on) unchecked.delete(id);
    else unchecked.add(id);
    boards.forEach(update);
    refresh();
  }

  function update(board) {
    const { section, lines } = board;
    const words = section.querySelector(".filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const task = section.querySelector(".task")?.value ?? "";
    let n = 0;
    for (const line of lines) {
      const id = line.dataset.row;
      const through = words.every((word) => line.dataset.text.includes(word)) && (!task || line.dataset.task === task);
      if (through) filtered.delete(id);
      else filtered.add(id);
      line.hidden = !through;
      line.classList.toggle("off", unchecked.has(id));
      line.querySelector("input.show").checked = !unchecked.has(id);
      n += shown(id);
    }
    section.querySelector(".shown").textContent = `${n} of ${lines.length} shown`;
    for (const card of all("[data-card]")) card.hidden = !shown(card.dataset.card);
    markBest(board);
    const csv = section.querySelector(".csv-shown");
    if (csv) csv.href = `data:text/csv;charset=utf-8,${encodeURIComponent(csvOf(board))}`;
  }

  // The best of each column among the rows shown; what looks equal is marked as equal.
  function markBest({ table, lines }) {
    all("thead th", table).forEach((head, column) => {
      const { best } = head.dataset;
      if (!best) return;
      const cells = lines.map((line) => line.cells[column]);
      cells.forEach((cell) => {
        cell.classList.remove("best");
        cell.querySelector(".hidden")?.remove();
      });
      const known = cells.map((cell) => [cell, cell.querySelector("data")])
        .filter(([cell, d]) => d && shown(cell.parentElement.dataset.row));
      const values = known.map(([, d]) => Number(d.value));
      if (new Set(values).size < 2) return;
      const top = best === "max" ? Math.max(...values) : Math.min(...values);
      const said = known[values.indexOf(top)][1].textContent;
      for (const [cell, d] of known.filter(([, other]) => other.textContent === said)) {
        cell.classList.add("best");
        d.insertAdjacentHTML("afterend", '<span class="hidden"> (best)</span>');
      }
    });
  }

  const csvOf = ({ body }) =>
    [data.csv.head, ...[...body.rows].map((line) => line.dataset.row).filter(shown).map((id) => data.csv.lines[id])]
      .join("");

  function sortBy({ table, body, lines }, column) {
    const heads = all("thead th", table);
    const head = heads[column];
    const first = head.dataset.best === "max" ? "descending" : "ascending";
    const other = { ascending: "descending", descending: "ascending" };
    const order = head.ariaSort && head.ariaSort !== "none" ? other[head.ariaSort] : first;
    heads.forEach((h) => h.querySelector("button") && h.setAttribute("aria-sort", h === head ? order : "none"));
    const value = (line) => {
      const cell = line.cells[column];
      const figure = cell.querySelector("data");
      if (figure) return Number(figure.value);
      return cell.querySelector(".name")?.textContent ?? null;
    };
    const sign = order === "ascending" ? 1 : -1;
    lines.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === null || y === null) return (x === null) - (y === null); // what has no figure comes last, either way
      return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    });
    body.append(...lines);
  }

  function setUp(board) {
    const { table, section, lines } = board;
    all("thead th", table).forEach((head, column) => {
      head.querySelector("button")?.addEventListener("click", () => {
        sortBy(board, column);
        update(board);
      });
    });
    for (const line of lines) {
      line.querySelector("input.show").addEventListener("change", (e) => check(line.dataset.row, e.target.checked));
    }
    for (const control of all(".filter, .task", section)) {
      control.addEventListener("input", () => {
        update(board);
        refresh();
      });
    }
    for (const button of all("[data-all]", section)) {
      button.addEventListener("click", () => {
        const on = button.dataset.all === "show";
        lines.filter((line) => !line.hidden).forEach((line) => {
          if (on) unchecked.delete(line.dataset.row);
          else unchecked.add(line.dataset.row);
        });
        update(board);
        refresh();
      });
    }
    all(".controls, .only-script", section).forEach((element) => { element.hidden = false; });
    update(board);
  }

  // ---- the rest

  function copy(button) {
    const source = document.getElementById(button.dataset.copy);
    const done = () => {
      document.getElementById("live").textContent = "Copied.";
      const { textContent } = button;
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = textContent; }, 1500);
    };
    const byHand = () => {
      getSelection().selectAllChildren(source);
      if (document.execCommand("copy")) done();
    };
    if (navigator.clipboard) navigator.clipboard.writeText(source.textContent).then(done, byHand);
    else byHand();
  }

  function openTarget() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target?.tagName === "DETAILS") target.open = true;
  }

  function setUpTheme() {
    const button = document.getElementById("theme");
    const now = () => root.dataset.theme || (dark.matches ? "dark" : "light");
    const name = () => { button.textContent = now() === "dark" ? "Light" : "Dark"; };
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = now() === "dark" ? "light" : "dark";
      name();
      draw();
    });
    dark.addEventListener("change", () => {
      name();
      draw();
    });
    name();
  }

  setUpTheme();
  boards.forEach(setUp);
  all("button[data-copy]").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", () => copy(button));
  });
  addEventListener("hashchange", openTarget);
  openTarget();
  setUpPlots();
  addEventListener("resize", refresh);
  window.zoo = { text }; // for who wants to check the numbers' texts
})();
