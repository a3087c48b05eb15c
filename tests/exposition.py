"""Reads `/metrics` as Prometheus would, by the parser of its own client library."""

from prometheus_client.parser import text_string_to_metric_families

MODEL = {"model_name": "tiny"}


class Shown:
    """The values of one answer of `/metrics`."""

    def __init__(self, text: str) -> None:
        self.families = {each.name: each for each in text_string_to_metric_families(text)}
        self._values = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """Returns the value of `mixtral_<name>` for the model and these labels."""
        return self._values[(f"mixtral_{name}", *sorted({**MODEL, **labels}.items()))]

    def by(self, label: str, name: str) -> dict[str, int]:
        """Returns the counts of `mixtral_<name>` that are not 0, by `label`."""
        samples = [sample for family in self.families.values() for sample in family.samples]
        return {
            sample.labels[label]: int(sample.value)
            for sample in samples
            if sample.name == f"mixtral_{name}" and sample.value
        }

    @property
    def series(self) -> set[object]:
        """Every name with its labels."""
        return set(self._values)

    @property
    def labels(self) -> dict[str, set[str]]:
        """Every label's values, but for `le`, the bounds of histograms."""
        found: dict[str, set[str]] = {}
        for _, *labels in self._values:
            for name, value in labels:
                found.setdefault(name, set()).add(value)
        found.pop("le", None)
        return found
