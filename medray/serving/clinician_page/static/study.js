// What a lead sees: progress, agreement, and what each clinician did.

const round = (value, digits = 2) => (value === null || value === undefined ? "not defined" : value.toFixed(digits));

function table(caption, head, rows) {
  const made = document.createElement("table");
  made.createCaption().textContent = caption;
  const top = made.createTHead().insertRow();
  for (const text of head) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = text;
    top.append(cell);
  }
  const body = made.createTBody();
  for (const values of rows) {
    const row = body.insertRow();
    values.forEach((value) => {
      const cell = row.insertCell();
      cell.textContent = value;
      if (typeof value === "number") cell.className = "number";
    });
  }
  return made;
}

export function studyTables(found) {
  const { progress, fleiss_kappa: fleiss, clinicians, cohen_kappa: pairs } = found;
  return [
    table("Progress", ["items", "complete", "judgements", "set aside"], [[progress.items, progress.complete, progress.judgements, progress.set_aside]]),
    table("Agreement of all (Fleiss' kappa)", ["of", "kappa", "subjects"], [
      ["single answers, good or not", round(fleiss.ticks.kappa), fleiss.ticks.subjects],
      ["choices of an item", round(fleiss.choices.kappa), fleiss.choices.subjects],
    ]),
    table("Agreement of two (Cohen's kappa)", ["clinicians", "single answers", "choices", "items both judged"],
      pairs.map((pair) => [`${pair.first}, ${pair.second}`, round(pair.ticks), round(pair.choices), pair.items])),
    table("Clinicians", ["name", "judged", "skipped", "not answerable", "edited", "median seconds", "chose the one shown first"],
      Object.entries(clinicians).map(([name, work]) =>
        [name, work.judged, work.skipped, work.not_answerable, work.edited, round(work.seconds, 0), work.first_preferred === null ? "not defined" : `${Math.round(100 * work.first_preferred)} %`])),
  ];
}
