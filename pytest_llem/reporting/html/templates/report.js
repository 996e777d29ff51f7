"use strict";
(() => {
  const { name: study, axes, plots } = JSON.parse(document.getElementById("llem-plots").textContent);
  const root = document.documentElement;
  // Without plotly's button that sends the plot to its server.
  const config = {
    responsive: true,
    displaylogo: false,
    typesetMath: false,
    showSendToCloud: false,
    plotlyServerURL: "",
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"]],
  };

  // ---- plots ----

  const isObject = (it) => it !== null && typeof it === "object" && !Array.isArray(it);

  // Values of `over` take precedence; traces are merged one by one.
  function merged(under, over) {
    const found = { ...under };
    for (const [key, value] of Object.entries(over)) {
      if (isObject(value) && isObject(found[key])) found[key] = merged(found[key], value);
      else if (key === "data" && found.data?.length) found.data = found.data.map((one, n) => merged(one, value[n] ?? {}));
      else found[key] = value;
    }
    return found;
  }

  // Replaces the names of CSS variables by their values, so that colours follow light and dark mode.
  function colored(it, style) {
    if (typeof it === "string") return it.startsWith("var(--") ? style.getPropertyValue(it.slice(4, -1)).trim() : it;
    if (Array.isArray(it)) return it.length && typeof it[0] === "number" ? it : it.map((one) => colored(one, style));
    if (isObject(it)) return Object.fromEntries(Object.entries(it).map(([key, one]) => [key, colored(one, style)]));
    return it;
  }

  function chosen(figure) {
    const { figure: base, layers } = plots[figure.dataset.plot];
    let found = base;
    let place = "";
    for (const select of figure.querySelectorAll("select[data-select]")) {
      place += (place && "/") + select.value;
      if (layers[place]) found = merged(found, layers[place]);
    }
    return found;
  }

  // The axis that a select box of the figure names; undefined if none.
  function axisOf(figure, what) {
    return axes[figure.querySelector(`select[data-by="${what}"]`)?.value || "none"];
  }

  // The figure as it is drawn with this width in px.
  function prepared(figure, width) {
    const style = getComputedStyle(root);
    const found = chosen(figure);
    const layout = { ...found.layout };
    if (width < 560) {
      layout.font = { ...layout.font, size: 11 };
      layout.margin = { l: 40, r: 6, t: 30, b: 44 };
    }
    const choices = { color: axisOf(figure, "color"), panel: axisOf(figure, "panel"), style, width };
    return colored(layoutOf({ ...found, layout }, choices), style);
  }

  function draw(figure) {
    const canvas = figure.querySelector(".canvas");
    const found = prepared(figure, canvas.clientWidth);
    figure.querySelector(".note").textContent = found.note ?? "";
    return Plotly.react(canvas, found.data, found.layout, config);
  }

  // The file's name: the study, the plot and what is selected.
  function fileName(figure) {
    const selected = [...figure.querySelectorAll("select[data-select]")].map((one) => one.selectedOptions[0].text);
    const words = [study, figure.dataset.plot, ...selected].map((text) => text.replace(/ \([^()]*\)$/, ""));
    return words.map((text) => text.replace(/[^\p{L}\p{N}_.=]+/gu, "-").replace(/^-+|-+$/g, "")).join("_").slice(0, 120);
  }

  // Light colours on white, whatever the page has, because images are for papers and slides.
  function save(figure, format) {
    const width = Math.max(800, figure.clientWidth);
    root.classList.add("printing");
    const { data, layout } = prepared(figure, width);
    root.classList.remove("printing");
    const white = { ...layout, paper_bgcolor: "#fff", plot_bgcolor: "#fff" };
    const image = { format, width, height: layout.height, scale: format === "png" ? 2 : 1, filename: fileName(figure) };
    return Plotly.downloadImage({ data, layout: white }, image);
  }

  const figures = [...document.querySelectorAll("figure[data-plot]")];
  const drawAll = () => Promise.all(figures.map(draw));
  for (const figure of figures) {
    figure.addEventListener("change", () => draw(figure));
    figure.addEventListener("click", ({ target }) => target.dataset.save && save(figure, target.dataset.save));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  // Draws one plot at a time and yields in between, so that the page stays responsive.
  (async () => {
    for (const figure of figures) {
      await draw(figure);
      await new Promise((done) => setTimeout(done));
    }
    root.dataset.drawn = "true";
  })();

  // ---- print: light colours, and everything unfolded except the tables behind plots, which may be long ----

  let folded = [];
  addEventListener("beforeprint", () => {
    root.classList.add("printing");
    folded = [...document.querySelectorAll("details:not([open], .data)")];
    for (const one of folded) one.open = true;
    drawAll();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    for (const one of folded) one.open = false;
    drawAll();
  });

  // ---- tables ----

  function sortValue(cell) {
    if (cell.dataset.sort !== undefined) return cell.dataset.sort === "" ? null : Number(cell.dataset.sort);
    const text = cell.textContent.trim();
    if (text === "–") return null;
    const number = Number(text.replaceAll(",", ""));
    return text === "" || Number.isNaN(number) ? text.toLowerCase() : number;
  }

  function compared(one, other) {
    if (typeof one === typeof other) return typeof one === "number" ? one - other : one.localeCompare(other);
    return typeof one === "number" ? -1 : 1;
  }

  function sort(head) {
    const table = head.closest("table");
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const one of table.tHead.rows[0].cells) one.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [sortValue(row.cells[head.cellIndex]), row]);
    rows.sort(([one], [other]) => {
      if (one === null || other === null) return (one === null) - (other === null); // missing values come last
      return down ? compared(other, one) : compared(one, other);
    });
    body.append(...rows.map(([, row]) => row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    table.tHead.addEventListener("click", (event) => {
      const head = event.target.closest("button")?.closest("th");
      if (head) sort(head);
    });
  }

  const table = document.getElementById("point-table");
  if (table === null) return; // the page of a history
  const count = document.getElementById("count");
  const allPoints = count.textContent;
  const rows = [...table.tBodies[0].rows].map((row) => ({
    row,
    text: `${row.textContent} ${row.dataset.keywords}`.toLowerCase(),
    keywords: new Set(row.dataset.keywords.split("\n")),
  }));
  document.getElementById("filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const { row, text, keywords } of rows) {
      const exact = (word) => word.indexOf("=") > 0 && !word.endsWith("=");
      const fits = words.every((word) => (exact(word) ? keywords.has(word) : text.includes(word)));
      row.hidden = !fits;
      left += fits;
    }
    count.textContent = left === rows.length ? allPoints : `${left} of ${allPoints}`;
  });
  document.getElementById("more").addEventListener("change", (event) => {
    table.classList.toggle("all-metrics", event.target.checked);
  });

  // The heading stays below the page's navigation. CSS cannot do that in a box that scrolls sideways.
  const heading = table.tHead;
  const navigation = document.querySelector("nav");
  addEventListener(
    "scroll",
    () => {
      const hidden = navigation.getBoundingClientRect().bottom - table.getBoundingClientRect().top - heading.offsetTop;
      const most = table.offsetHeight - heading.offsetTop - heading.offsetHeight;
      heading.style.transform = hidden > 0 ? `translateY(${Math.min(hidden, most)}px)` : "";
    },
    { passive: true },
  );
})();
