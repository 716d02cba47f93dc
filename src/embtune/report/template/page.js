"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const node = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const decimals = (value, digits) => value.toFixed(digits).replace("-", "−");
  const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);

  // Light and dark: as the system says, until the button says otherwise.
  const root = document.documentElement;
  const button = byId("theme");
  const stored = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("embtune-theme", value);
      return localStorage.getItem("embtune-theme");
    } catch (error) {
      return null; // storage is off; the choice lasts as long as the page
    }
  };
  const isDark = () => getComputedStyle(root).colorScheme === "dark" ||
    (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const showTheme = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `${button.textContent} colours`);
    button.hidden = false;
  };
  if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(root.dataset.theme);
    showTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  showTheme();

  // The query explorer.
  const change = (query) => query.after.score - query.before.score;
  const orders = {
    worst: (a, b) => change(a) - change(b),
    best: (a, b) => change(b) - change(a),
    low: (a, b) => a.after.score - b.after.score || change(a) - change(b),
  };

  const explorer = () => {
    const box = document.querySelector(".explorer");
    if (!box) return;
    const sets = JSON.parse(byId("data").textContent);
    const list = byId("queries"), detail = byId("detail"), filter = byId("filter");
    let set = sets[0], shown = [], selected = -1;

    const hitItem = (hit, rank) => {
      const [index, score, right] = hit;
      const item = node("li", right ? "right" : "");
      const head = node("div", "hit");
      head.append(node("span", "", String(rank)), node("span", "", set.documents[index].id));
      if (right) head.append(node("strong", "", "right"));
      head.append(node("span", "", decimals(score, 3)));
      item.append(head, node("p", "text", set.documents[index].text));
      return item;
    };
    const where = (side) => side.rank ? `first right one at rank ${side.rank}` : `no right one in the first ${set.depth}`;
    const sideOf = (name, side) => {
      const part = node("div");
      part.append(node("h4", "", `${name}: ${set.metric} ${decimals(side.score, 3)}`));
      if (side.hits.length) {
        part.append(node("p", "note", where(side)));
        const results = node("ol");
        side.hits.forEach((hit, place) => results.append(hitItem(hit, place + 1)));
        part.append(results);
      }
      return part;
    };
    const showDetail = (query) => {
      detail.replaceChildren();
      if (!query) {
        detail.append(node("p", "note", "No query has these words. Clear the filter to see all."));
        return;
      }
      detail.append(node("h3", "", query.text), node("p", "note", `${query.id} · ${signed(change(query), 3)} ${set.metric}`));
      const sides = node("div", "sides");
      sides.append(sideOf("Before", query.before), sideOf("After", query.after));
      detail.append(sides);
      const found = new Set([...query.before.hits, ...query.after.hits].map((hit) => hit[0]));
      const missed = query.right.filter((index) => !found.has(index));
      if (missed.length) {
        detail.append(node("h4", "missed", "Right, but not shown above"));
        missed.forEach((index) => detail.append(node("p", "text", `${set.documents[index].id}: ${set.documents[index].text}`)));
      }
    };
    const ring = (query) => {
      document.querySelectorAll(".ring").forEach((old) => old.remove());
      const map = document.querySelector(`[data-map="${set.map}"]`);
      if (!map || !query) return;
      const point = maps.get(map).indexOf(query.id);
      map.querySelectorAll(`use[data-point="${point}"]`).forEach((use) => {
        const circle = document.createElementNS("http://www.w3.org/2000/svg", "circle");
        circle.setAttribute("class", "ring");
        circle.setAttribute("cx", use.getAttribute("x"));
        circle.setAttribute("cy", use.getAttribute("y"));
        circle.setAttribute("r", "6.5");
        use.parentNode.append(circle);
      });
    };
    const select = (place, scroll) => {
      selected = Math.max(0, Math.min(shown.length - 1, place));
      list.querySelectorAll("[aria-selected=true]").forEach((old) => old.setAttribute("aria-selected", "false"));
      const item = list.children[selected];
      if (item) {
        item.setAttribute("aria-selected", "true");
        list.setAttribute("aria-activedescendant", item.id);
        if (scroll) list.scrollTop = Math.max(
          Math.min(list.scrollTop, item.offsetTop - list.offsetTop - 6),
          item.offsetTop - list.offsetTop + item.offsetHeight - list.clientHeight + 6);
      } else {
        list.removeAttribute("aria-activedescendant");
      }
      showDetail(shown[selected]);
      ring(shown[selected]);
    };
    const searched = (query) => [query.id, query.text, ...[...query.before.hits, ...query.after.hits]
      .map((hit) => set.documents[hit[0]].text)].join("\n").toLowerCase();
    const fill = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      shown = set.queries.filter((query) => words.every((word) => searched(query).includes(word)));
      shown.sort(orders[byId("order").value]);
      list.replaceChildren(...shown.map((query, place) => {
        const item = node("li");
        item.id = `query-${place}`;
        item.setAttribute("role", "option");
        item.setAttribute("aria-selected", "false");
        const amount = change(query);
        const kind = amount > 5e-5 ? "up" : amount < -5e-5 ? "down" : "same";
        item.append(node("span", "", query.text), node("span", kind, kind === "same" ? "±0.000" : signed(amount, 3)));
        item.addEventListener("click", () => select(place, false));
        return item;
      }));
      const total = set.items.toLocaleString("en");
      const kept = set.queries.length < set.items ? `; the page keeps ${set.queries.length} of ${total}: the most changed` : "";
      byId("count").textContent = `${shown.length} ${shown.length === 1 ? "query" : "queries"}${kept}`;
      list.scrollTop = 0;
      select(0, false);
    };
    const keys = (event) => {
      const page = Math.max(1, Math.floor(list.clientHeight / 36) - 1);
      const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
      if (event.key in moves) select(selected + moves[event.key], true);
      else if (event.currentTarget === list && event.key === "Home") select(0, true);
      else if (event.currentTarget === list && event.key === "End") select(shown.length - 1, true);
      else return;
      event.preventDefault();
    };
    const maps = new Map([...document.querySelectorAll(".map")].map((map) => [map, JSON.parse(map.dataset.queries)]));
    maps.forEach((queries, map) => map.addEventListener("click", (event) => {
      const use = event.target.closest("use[data-point]");
      const place = use ? shown.findIndex((query) => query.id === queries[use.dataset.point]) : -1;
      if (place >= 0 && map.dataset.map === String(set.map)) {
        select(place, true);
        detail.scrollIntoView({ block: "nearest" });
      }
    }));
    list.addEventListener("keydown", keys);
    filter.addEventListener("keydown", keys);
    filter.addEventListener("input", fill);
    byId("order").addEventListener("change", fill);
    byId("set").addEventListener("change", (event) => { set = sets[event.target.value]; fill(); });
    byId("no-script").hidden = true;
    box.hidden = false;
    fill();
  };
  const sections = () => [...document.querySelectorAll("main > section")];
  const sources = new Map(sections().map((section) => [section.id, section.innerHTML]));
  explorer();

  // A page that is being watched: ask for news, and exchange the sections that changed.
  const ago = () => document.querySelectorAll("[data-ago]").forEach((time) => {
    const seconds = Math.max(0, Math.round(Date.now() / 1000 - Number(time.dataset.ago)));
    const [unit, length] = [["days", 86400], ["hours", 3600], ["min", 60], ["s", 1]].find(([, each]) => seconds >= 2 * each) || ["s", 1];
    time.textContent = `${Math.round(seconds / length)} ${unit} ago`;
  });
  ago();
  const main = byId("main");
  if (!("live" in main.dataset)) return;
  setInterval(ago, 1000);
  const lost = node("p", "empty", "embtune watch has ended; what is shown is the last it had to say.");
  const refresh = async () => {
    const address = new URL(location.href);
    address.searchParams.set("since", main.dataset.version);
    let answer;
    try {
      answer = await fetch(address, { cache: "no-store" });
    } catch (error) {
      byId("overview").append(lost);
      return;
    }
    lost.remove();
    if (answer.status !== 200) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const news = fresh.getElementById("main");
    main.dataset.version = news.dataset.version;
    byId("data").textContent = fresh.getElementById("data").textContent;
    document.title = fresh.title;
    const changed = new Set([...news.querySelectorAll("section")]
      .filter((section) => sources.get(section.id) !== section.innerHTML).map((section) => section.id));
    const queries = changed.has("map") || changed.has("explorer");
    if (queries) changed.add("map").add("explorer"); // the two point to each other
    changed.forEach((id) => {
      const section = fresh.getElementById(id);
      sources.set(id, section.innerHTML);
      byId(id).replaceWith(document.importNode(section, true));
    });
    if (queries) explorer();
    ago();
  };
  setInterval(refresh, 3000);
})();
