// The filter of the cards only shows where it works.
const filters = document.querySelector(".filters");
const cards = [...document.querySelectorAll(".card")];
function showCards() {
  const column = filters.querySelector(":checked").value;
  for (const card of cards) card.hidden = column !== "" && card.dataset.column !== column;
  const count = cards.filter((card) => !card.hidden).length;
  document.getElementById("count").textContent = `${count} ${count === 1 ? "sentence" : "sentences"}`;
}
filters.hidden = false;
filters.addEventListener("change", showCards);
showCards();
