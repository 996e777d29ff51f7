"use strict";
// How a figure is changed before plotly draws it: colours and panels by axis, and labels of marks that do not overlap.
const layoutOf = (() => {
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star"];
  const COLORS = 8;
  const FONT_WIDTH = 6.4; // px of a character of a mark's label
  const FONT_HEIGHT = 13;

  // A trace with only those of its marks whose numbers are in `kept`, in all its lists.
  function picked(it, length, kept) {
    if (Array.isArray(it)) return it.length === length ? kept.map((n) => it[n]) : it;
    if (it === null || typeof it !== "object") return it;
    return Object.fromEntries(Object.entries(it).map(([key, one]) => [key, picked(one, length, kept)]));
  }

  // Whether lines run along an axis: they have neither one colour nor one panel by it.
  function runsAlong(found, axis) {
    const values = (trace) => new Set(trace.meta.map((point) => axis.of[point]));
    return found.data.some((trace) => trace.meta && trace.mode?.includes("lines") && values(trace).size > 1);
  }

  // Pairs of a value's index and the part of a trace with that value.
  function parts(trace, axis) {
    if (!trace.meta) return [[null, trace]];
    const numbers = new Map();
    trace.meta.forEach((point, n) => numbers.set(axis.of[point], [...(numbers.get(axis.of[point]) ?? []), n]));
    if (numbers.size === 1) return [[axis.of[trace.meta[0]], trace]];
    return [...numbers].map(([value, kept]) => [value, picked(trace, trace.meta.length, kept)]);
  }

  function hex(mixed) {
    return "#" + mixed.map((part) => Math.round(part).toString(16).padStart(2, "0")).join("");
  }

  // The colour of a value: numbers along a scale, others in a fixed order.
  function colorOf(axis, value, style) {
    const named = (name) => style.getPropertyValue(`--${name}`).trim();
    if (value === null) return named("muted");
    if (!axis.isNumber || axis.values.length < 3) return named(`series-${(value % COLORS) + 1}`);
    const stops = [1, 2, 3].map((n) => named(`scale-${n}`));
    const at = (2 * value) / (axis.values.length - 1);
    const [from, to] = [Math.min(1, Math.floor(at)), Math.min(1, Math.floor(at)) + 1];
    const rgb = (color) => [1, 3, 5].map((n) => Number.parseInt(color.slice(n, n + 2), 16));
    return hex(rgb(stops[from]).map((part, n) => part + (at - from) * (rgb(stops[to])[n] - part)));
  }

  function valueName(axis, value) {
    return value === null ? `without ${axis.name}` : axis.values[value];
  }

  function byColor(found, axis, style, width) {
    const named = new Set();
    const rank = (value) => value ?? axis.values.length;
    const data = found.data.flatMap((trace) =>
      parts(trace, axis).map(([value, part]) => {
        if (!trace.meta) return part;
        const color = colorOf(axis, value, style);
        const repeats = axis.isNumber ? 0 : Math.floor(value / COLORS); // of the colours
        const symbol = typeof part.marker?.symbol === "string" && part.mode.includes("lines") ? { symbol: SYMBOLS[repeats % SYMBOLS.length] } : {};
        const first = !named.has(value);
        named.add(value);
        const colored = { ...part, name: valueName(axis, value), legendgroup: `${value}`, legendrank: 1000 + rank(value), showlegend: first };
        colored.marker = { ...part.marker, ...symbol, color };
        colored.line = { ...part.line, color: part.type === "box" || part.mode?.includes("lines") ? color : undefined };
        if (part.error_y) colored.error_y = { ...part.error_y, color };
        if (part.error_x) colored.error_x = { ...part.error_x, color };
        if (part.type === "box") colored.fillcolor = `${color}33`;
        return colored;
      }),
    );
    const legend = { ...found.layout.legend, title: { text: axis.name, side: width < 560 ? "top" : "left", font: { size: 13 } } };
    return { ...found, data, layout: { ...found.layout, legend, showlegend: true } };
  }

  // Shapes are drawn in every panel.
  function shapeIn(shape, n) {
    const reference = (given, letter) => (given === "paper" ? `${letter}${n} domain` : `${letter}${n}`);
    const label = n === "" ? shape.label : undefined;
    return { ...shape, xref: reference(shape.xref, "x"), yref: reference(shape.yref, "y"), label };
  }

  function byPanel(found, axis, width) {
    const split = found.data.map((trace) => [trace, parts(trace, axis)]);
    const values = [...new Set(split.flatMap(([trace, all]) => (trace.meta ? all.map(([value]) => value) : [])))];
    if (values.length < 2) return found;
    values.sort((one, other) => (one ?? Infinity) - (other ?? Infinity));
    const fitting = Math.max(1, Math.floor(width / 300));
    const columns = Math.min(fitting, values.length === 4 ? 2 : 3, values.length);
    const rows = Math.ceil(values.length / columns);
    const plotHeight = rows === 1 ? 340 : rows * 250;
    const [across, down] = [0.035, rows === 1 ? 0 : 56 / plotHeight];
    const size = (n, gap) => (1 - gap * (n - 1)) / n;
    const layout = { ...found.layout, annotations: [], shapes: [] };
    const margin = { ...layout.margin, t: layout.margin.t + 26, b: layout.margin.b + 16 };
    Object.assign(layout, { margin, height: plotHeight + margin.t + margin.b });
    layout.legend = { ...layout.legend, y: 1 + 26 / plotHeight };
    values.forEach((value, place) => {
      const n = place ? place + 1 : "";
      const [column, row] = [place % columns, Math.floor(place / columns)];
      const left = column * (size(columns, across) + across);
      const top = 1 - row * (size(rows, down) + down);
      const isLowest = place + columns >= values.length;
      const linked = (letter) => (place ? { matches: letter } : {});
      const titled = (given, isShown) => ({ ...given, title: isShown ? given.title : { text: "" } });
      layout[`xaxis${n}`] = {
        ...titled(found.layout.xaxis, isLowest),
        ...linked("x"),
        domain: [left, left + size(columns, across)],
        anchor: `y${n}`,
      };
      layout[`yaxis${n}`] = {
        ...titled(found.layout.yaxis, column === 0),
        ...linked("y"),
        domain: [Math.max(0, top - size(rows, down)), top],
        anchor: `x${n}`,
        showticklabels: column === 0,
      };
      const corner = { xref: `x${n} domain`, yref: `y${n} domain`, x: 0, y: 1, xanchor: "left", yanchor: "bottom" };
      const title = `${axis.name} = ${valueName(axis, value)}`;
      const fits = title.length * 8 < (width / columns) * 0.9;
      layout.annotations.push({ ...corner, showarrow: false, text: `<b>${fits ? title : valueName(axis, value)}</b>` });
      layout.shapes.push(...(found.layout.shapes ?? []).map((shape) => shapeIn(shape, n)));
    });
    const shown = new Set();
    const data = split.flatMap(([trace, all]) => {
      const everywhere = trace.meta ? all : values.map((value) => [value, trace]);
      return everywhere.map(([value, part]) => {
        const n = values.indexOf(value) ? values.indexOf(value) + 1 : "";
        const group = part.legendgroup ?? part.name;
        const showlegend = part.showlegend !== false && !shown.has(group);
        if (showlegend) shown.add(group);
        return { ...part, xaxis: `x${n}`, yaxis: `y${n}`, legendgroup: group, showlegend };
      });
    });
    return { ...found, data, layout, panels: columns };
  }

  function rangeOf(axis, values) {
    if (axis.range) return axis.range;
    const known = values.filter((one) => one !== null).map((one) => (axis.type === "log" ? Math.log10(one) : one));
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const margin = 0.06 * (high - low || 1);
    return [axis.rangemode === "tozero" ? Math.min(0, low) : low - margin, high + margin];
  }

  // Puts the label of each mark where it overlaps neither another label nor a mark, or leaves it out.
  function withLabels(found, width) {
    const axes = new Set(found.data.map((trace) => trace.xaxis ?? "x"));
    const across = (width - found.layout.margin.l - found.layout.margin.r - 20) / (found.panels ?? 1);
    const down = found.layout.height - found.layout.margin.t - found.layout.margin.b - 20;
    for (const name of axes) {
      const traces = found.data.filter((trace) => (trace.xaxis ?? "x") === name && trace.mode?.includes("markers"));
      if (!traces.some((trace) => trace.mode.includes("text"))) continue;
      const { xaxis, yaxis } = found.layout;
      const height = yaxis.domain ? down * (yaxis.domain[1] - yaxis.domain[0]) : down;
      const scale = (axis, values) => {
        const [low, high] = rangeOf(axis, values);
        return (value) => ((axis.type === "log" ? Math.log10(value) : value) - low) / (high - low);
      };
      const x = scale(xaxis, traces.flatMap((trace) => [...trace.x]));
      const y = scale(yaxis, traces.flatMap((trace) => [...trace.y]));
      const at = (trace, n) => [x(trace.x[n]) * across, (1 - y(trace.y[n])) * height];
      const known = (trace, n) => trace.x[n] !== null && trace.y[n] !== null && trace.y[n] !== undefined;
      const taken = traces.flatMap((trace) =>
        trace.x.map((_, n) => [trace, n]).filter(([one, n]) => known(one, n)).map(([one, n]) => {
          const [left, top] = at(one, n);
          return [left - 5, top - 5, left + 5, top + 5];
        }),
      );
      const isFree = ([left, top, right, bottom]) =>
        left >= 0 && top >= 0 && right <= across && bottom <= height &&
        taken.every((one) => right <= one[0] || left >= one[2] || bottom <= one[1] || top >= one[3]);
      for (const trace of traces.toReversed().filter((one) => one.mode.includes("text"))) {
        const positions = [];
        trace.text = trace.text.map((text, n) => {
          positions.push("top right");
          if (!known(trace, n)) return "";
          const [px, py] = at(trace, n);
          const wide = text.length * FONT_WIDTH;
          for (const [side, left] of [["right", px + 5], ["left", px - 5 - wide], ["center", px - wide / 2]]) {
            for (const [level, top] of [["top", py - 6 - FONT_HEIGHT], ["bottom", py + 6], ["middle", py - FONT_HEIGHT / 2]]) {
              const box = [left, top, left + wide, top + FONT_HEIGHT];
              if (level + side !== "middlecenter" && isFree(box)) {
                taken.push(box);
                positions[n] = `${level} ${side}`;
                return text;
              }
            }
          }
          return "";
        });
        trace.textposition = positions;
      }
    }
    return found;
  }

  return (figure, { color, panel, style, width }) => {
    let found = figure;
    if (color && !runsAlong(found, color)) found = byColor(found, color, style, width);
    if (panel && !runsAlong(found, panel)) found = byPanel(found, panel, width);
    return withLabels({ ...found, data: found.data.map((trace) => ({ ...trace })) }, width);
  };
})();
