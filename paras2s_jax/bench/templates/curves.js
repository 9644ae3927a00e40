// Charts read out single steps, by pointer or arrow keys.
for (const figure of document.querySelectorAll(".chart")) {
  const svg = figure.querySelector("svg");
  if (!svg) continue;
  const steps = JSON.parse(svg.dataset.steps);
  const at = JSON.parse(svg.dataset.at);
  const keys = [...figure.querySelectorAll(".key")];
  const values = keys.map((key) => JSON.parse(key.dataset.values));
  const cursor = svg.querySelector(".cursor");
  const output = figure.querySelector("output");
  const resting = { text: output.textContent, values: keys.map((key) => key.querySelector("b").textContent) };
  let index = steps.length - 1;
  const read = (next) => {
    index = Math.min(Math.max(next, 0), steps.length - 1);
    cursor.setAttribute("x1", at[index]);
    cursor.setAttribute("x2", at[index]);
    cursor.setAttribute("visibility", "visible");
    keys.forEach((key, i) => {
      const value = values[i][index];
      key.querySelector("b").textContent = value === null ? "n/a" : Number(value.toPrecision(3));
    });
    output.textContent = `step ${steps[index]}`;
  };
  const rest = () => {
    cursor.setAttribute("visibility", "hidden");
    keys.forEach((key, i) => { key.querySelector("b").textContent = resting.values[i]; });
    output.textContent = resting.text;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let best = 0;
    at.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(at[best] - x)) best = i; });
    read(best);
  });
  svg.addEventListener("pointerleave", rest);
  svg.addEventListener("blur", rest);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    read(index + move);
  });
}
