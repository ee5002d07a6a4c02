// SECTIONS: [page, chapter, section, words], written by the builder before this script.
const field = document.getElementById("search");
const found = document.getElementById("found");
const contents = document.getElementById("contents");
const here = location.pathname.split("/").pop() || "index.html";
for (const link of contents.querySelectorAll("a")) {
  if (link.getAttribute("href") === here) link.setAttribute("aria-current", "page");
}
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  found.hidden = !words.length;
  contents.hidden = !!words.length;
  found.replaceChildren();
  if (!words.length) return;
  const hits = SECTIONS.filter(([, , title, text]) =>
    words.every((word) => (title + " " + text).toLowerCase().includes(word)));
  for (const [page, chapter, title] of hits.slice(0, 20)) {
    const link = document.createElement("a");
    link.href = page;
    link.textContent = title === chapter ? chapter : `${chapter}: ${title}`;
    const item = document.createElement("li");
    item.append(link);
    found.append(item);
  }
  if (!hits.length) found.textContent = "Nothing found.";
});
