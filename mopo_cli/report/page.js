"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const data = JSON.parse($("data").textContent);

  // ------------------------------------------------------------------ theme: system, light, dark
  const themes = ["system", "light", "dark"];
  let theme = 0;
  $("theme").onclick = () => {
    theme = (theme + 1) % 3;
    if (theme) document.documentElement.dataset.theme = themes[theme];
    else delete document.documentElement.dataset.theme;
    $("theme").textContent = `theme: ${themes[theme]}`;
  };

  // ------------------------------------------------------------------ table: sort, filter, choose
  const chosen = new Set();
  const rows = all("#table tbody tr");
  const value = (row, column) => data.values[row.dataset.run][column];

  function sortBy(header, column) {
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of all("#table th[aria-sort]")) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    rows.sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is missing comes last either way
      if (typeof x === "number" && typeof y === "number") return sign * (x - y);
      return sign * String(x).localeCompare(String(y), undefined, { numeric: true });
    });
    $("table").tBodies[0].append(...rows);
  }

  const compare = {
    "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b,
  };

  function test(word) {
    const match = /^(.+?)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/i.exec(word);
    const column = match ? data.columns.findIndex((title) => title.toLowerCase() === match[1].toLowerCase()) : -1;
    if (column < 0) return (row) => row.textContent.toLowerCase().includes(word.toLowerCase());
    return (row) => typeof value(row, column) === "number" && compare[match[2]](value(row, column), Number(match[3]));
  }

  function filter() {
    const tests = $("filter").value.trim().split(/\s+/).filter(Boolean).map(test);
    const method = $("method")?.value;
    if (method) tests.push((row) => value(row, data.method) === method);
    for (const row of rows) row.hidden = !tests.every((passes) => passes(row));
    const left = rows.filter((row) => !row.hidden).length;
    $("count").textContent = left === rows.length ? "" : `${left} of ${rows.length}`;
    highlight();
  }

  function choose(run, on) {
    if (on) chosen.add(run); else chosen.delete(run);
    for (const row of rows) {
      row.classList.toggle("chosen", chosen.has(row.dataset.run));
      row.querySelector("input").checked = chosen.has(row.dataset.run);
    }
    if ($("clear")) $("clear").disabled = !chosen.size;
    highlight();
    sideBySide([...chosen]);
  }

  /** The runs that stand out in the figures: the chosen ones, else those that pass the filter. */
  function standing() {
    if (chosen.size) return [...chosen];
    const left = rows.filter((row) => !row.hidden);
    return left.length === rows.length ? [] : left.map((row) => row.dataset.run).concat("\u0000");
  }

  if ($("table")) {
    for (const button of all("#table th button")) {
      button.onclick = () => sortBy(button.closest("th"), Number(button.dataset.column));
    }
    $("filter").oninput = filter;
    if ($("method")) $("method").onchange = filter;
    $("clear").onclick = () => { for (const run of [...chosen]) choose(run, false); };
    $("csv").onclick = () => save(new Blob([data.csv], { type: "text/csv" }), `${data.name}.csv`);
    $("table").tBodies[0].onchange = (event) => choose(event.target.closest("tr").dataset.run, event.target.checked);
  }

  // ------------------------------------------------------------------ figures
  const views = new Map();
  const rowsOf = (columns) => {
    const keys = Object.keys(columns);
    const length = keys.length ? columns[keys[0]].length : 0;
    return Array.from({ length }, (_, i) => {
      const row = {};
      for (const key of keys) if (columns[key][i] !== null) row[key] = columns[key][i];
      return row;
    });
  };
  for (const section of data.sections) {
    for (const name of Object.keys(section.datasets)) section.datasets[name] = rowsOf(section.datasets[name]);
  }

  const figureOf = (name) => {
    const [section, figure] = name.split("/").map(Number);
    return [data.sections[section], data.sections[section].figures[figure]];
  };

  /** The figure as one Vega-Lite chart, as many panels beside one another as fit. */
  function composed(section, figure, room) {
    const forest = figure.panels[0].rows ? 20 + 6.6 * figure.label : 0;
    const gap = 28, around = forest ? 26 : 66;
    const columns = Math.max(1, Math.min(figure.columns, figure.panels.length, Math.floor((room - forest) / 265)));
    const width = Math.max(140, Math.floor((room - forest - gap * (columns - 1)) / columns - around));
    const used = JSON.stringify(figure.panels);
    const datasets = {};
    for (const name of Object.keys(section.datasets)) {
      if (used.includes(`"${name}"`)) datasets[name] = section.datasets[name];
    }
    const panels = figure.panels.map(({ chart, wide, rows: lines }, number) => {
      const spec = structuredClone(chart);
      if (lines) {
        for (const { encoding } of spec.layer) if (encoding.y) encoding.y.axis.labels = number % columns === 0;
      }
      spec.width = Math.min(width, wide ? 720 : 460);
      spec.height = figure.height || Math.max(28 * lines, 60);
      return spec;
    });
    const scale = {};
    for (const name of ["color", "shape", "strokeDash", "stroke", "fill"]) {
      scale[name] = figure.shared.includes(name) ? "shared" : "independent";
    }
    const legend = { ...data.config.legend, columns: Math.max(1, Math.min(4, Math.floor(room / 240))) };
    if (room < 600) for (const panel of panels) for (const layer of panel.layer) narrowLegends(layer.encoding);
    return {
      config: { ...data.config, legend }, datasets, concat: panels, columns, spacing: gap, resolve: { scale },
      params: [{ name: "chosen", value: standing() }], padding: 4,
    };
  }

  function narrowLegends(encoding) {
    for (const channel of Object.values(encoding)) {
      const legend = channel.legend ?? channel.condition?.legend;
      if (legend?.columns) legend.columns = 1;
    }
  }

  async function draw(element) {
    const [section, figure] = figureOf(element.dataset.figure);
    views.get(element)?.finalize();
    const spec = composed(section, figure, element.clientWidth);
    const options = { mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false, tooltip: { disableDefaultStyle: true } };
    const { view } = await vegaEmbed(element, spec, options);
    view.addEventListener("click", (_, item) => {
      const run = item?.datum?.run;
      if (run && data.values[run] && rows.length) choose(run, !chosen.has(run));
    });
    views.set(element, view);
  }

  const rest = () => new Promise((resolve) => setTimeout(resolve));
  let drawing = Promise.resolve();
  function drawAll() {
    delete document.documentElement.dataset.drawn;
    drawing = drawing.then(async () => {
      for (const element of all(".chart")) {
        try { await draw(element); } catch (error) { element.textContent = `cannot be drawn: ${error.message}`; }
        await rest();
      }
      document.documentElement.dataset.drawn = "yes";
    });
  }

  function highlight() {
    for (const view of views.values()) view.signal("chosen", standing()).runAsync();
  }

  for (const select of all("[data-way]")) {
    select.onchange = () => {
      const section = data.sections[Number(select.dataset.section)];
      const setting = section.settings[Number(select.value)];
      for (const row of section.datasets.runs) row[select.dataset.way] = row.settings[Number(select.value)];
      const figure = section.figures.find(({ id }) => id === "stability");
      for (const panel of figure.panels) {
        for (const layer of panel.chart.layer) {
          const channel = layer.encoding[select.dataset.way === "across" ? "x" : "y"];
          channel.sort = setting.values;
          channel.axis.title = setting.key;
          for (const row of layer.encoding.tooltip ?? []) if (row.field === select.dataset.way) row.title = setting.key;
        }
      }
      draw(select.closest("section").querySelector(".chart"));
    };
  }

  let width = innerWidth, waiting;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    delete document.documentElement.dataset.drawn;
    waiting = setTimeout(drawAll, 200);
  });

  // ------------------------------------------------------------------ files
  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  for (const button of all("[data-save]")) {
    button.onclick = async () => {
      const element = document.querySelector(`.chart[data-figure="${button.dataset.figure}"]`);
      const name = `${data.name}_${figureOf(button.dataset.figure)[1].id}`;
      const svg = (await views.get(element).toSVG()).replace(/var\(--(\w+)\)/g, (_, colour) => data.light[colour]);
      const file = new Blob([svg], { type: "image/svg+xml" });
      if (button.dataset.save === "svg") return save(file, `${name}.svg`);
      const image = new Image();
      image.onload = () => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
        const context = canvas.getContext("2d");
        context.fillStyle = data.light.paper;
        context.fillRect(0, 0, canvas.width, canvas.height);
        context.drawImage(image, 0, 0, canvas.width, canvas.height);
        canvas.toBlob((blob) => save(blob, `${name}.png`));
      };
      image.src = URL.createObjectURL(file);
    };
  }

  for (const button of all("[data-copy]")) {
    button.onclick = async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch { // no permission: select it, so that the keyboard can
        getSelection().selectAllChildren(code);
        document.execCommand("copy");
      }
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    };
  }
  if ($("which")) {
    $("which").onchange = () => {
      for (const block of all(".own")) block.hidden = block.dataset.of !== $("which").value;
    };
  }

  // ------------------------------------------------------------------ samples, side by side
  const prompts = data.samples.prompts;
  const sampled = Object.keys(data.samples.runs);
  let columns = sampled.slice(0, 2);
  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };

  function listPrompts() {
    const wanted = $("search").value.toLowerCase();
    const before = $("prompts").value;
    const options = prompts.map((text, number) => [text, number]).filter(([text]) => text.toLowerCase().includes(wanted));
    $("prompts").replaceChildren(...options.map(([text, number]) => {
      const option = make("option", text.length > 160 ? `${text.slice(0, 160)}…` : text);
      option.value = number;
      return option;
    }));
    const still = options.some(([, number]) => String(number) === before);
    $("prompts").value = still ? before : options.length ? String(options[0][1]) : "";
    showSamples();
  }

  function scores(names, numbers) {
    return names.map((name, k) => {
      const line = make("div", undefined, "score");
      const bar = make("i");
      const share = numbers[k] === null ? 0 : Math.max(0, Math.min(1, numbers[k]));
      bar.style.setProperty("--share", `${100 * share}%`);
      line.append(make("span", name), bar, make("b", numbers[k] === null ? "–" : numbers[k].toFixed(2)));
      return line;
    });
  }

  function showSamples() {
    const number = $("prompts").value;
    $("prompt").textContent = number === "" ? "no prompt matches" : prompts[Number(number)];
    $("side").replaceChildren(...columns.map((run, place) => {
      const article = make("article");
      if (sampled.length > 1) {
        const select = make("select");
        select.setAttribute("aria-label", `run in column ${place + 1}`);
        select.append(...sampled.map((name) => make("option", name)));
        select.value = run;
        select.onchange = () => { columns[place] = select.value; showSamples(); };
        article.append(select);
      }
      const { names, answers } = data.samples.runs[run];
      const responses = answers[number] ?? [];
      if (!responses.length) article.append(make("p", "no sample of this prompt", "soft small"));
      for (const [text, numbers] of responses) {
        const response = make("div", undefined, "response");
        response.append(make("p", text), ...scores(names, numbers));
        article.append(response);
      }
      return article;
    }));
    $("more").disabled = columns.length >= Math.min(4, sampled.length);
    $("fewer").disabled = columns.length < 2;
  }

  function sideBySide(runs) {
    const wanted = runs.filter((run) => sampled.includes(run)).slice(0, 4);
    if (!wanted.length) return;
    columns = wanted;
    showSamples();
  }

  function step(by) {
    const list = $("prompts");
    const next = list.selectedIndex + by;
    if (next >= 0 && next < list.options.length) { list.selectedIndex = next; showSamples(); }
  }

  if (prompts.length) {
    $("nosamples").hidden = true;
    $("sampling").hidden = false;
    $("search").oninput = listPrompts;
    $("prompts").onchange = showSamples;
    $("before").onclick = () => step(-1);
    $("after").onclick = () => step(1);
    $("more").onclick = () => { columns.push(sampled.find((run) => !columns.includes(run))); showSamples(); };
    $("fewer").onclick = () => { columns.pop(); showSamples(); };
    listPrompts();
  }

  addEventListener("beforeprint", () => { for (const details of all("details")) details.open = true; });
  document.documentElement.dataset.ready = Math.round(performance.now()); // ms: tables and samples can be used
  drawAll();
})();
