"""What all three dashboards have in common: variables, kinds of panels, thresholds, selectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import TypeVar

from grafana_foundation_sdk.builders import bargauge, heatmap, stat, statetimeline, timeseries
from grafana_foundation_sdk.builders.common import (
    GraphThresholdsStyleConfig,
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.heatmap import HeatmapColorOptions, YAxisConfig
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

INSTALLATION = 'namespace=~"$namespace",job=~"$job"'
"""Which proxies belong together: key stores of the same name elsewhere are others."""

HERE = f'{INSTALLATION},instance=~"$instance"'
STORE = f'{HERE},keystore=~"$keystore"'
KMI = f'{HERE},kmi=~"$kmi"'

FAILED = (
    'code=~"ServiceUnavailable|Timeout|InternalServerError'
    "|DependencyTimeoutException|InternalException"
    '|UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL"'
)
"""The codes of answers that are failures of ours, not of the client."""

DEADLINE_SECONDS = 0.25
SLOW_SECONDS = 0.1
"""What is slower counts against the objective of latency: see grafana/rules/recording.yml."""

GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"

Steps = Sequence[tuple[float | None, str]]
"""From which value on which colour; the first from None on."""

LATENCY: Steps = ((None, GREEN), (SLOW_SECONDS, YELLOW), (DEADLINE_SECONDS, RED))
NONE_IS_GOOD: Steps = ((None, GREEN), (1, RED))

Panel = TypeVar(
    "Panel",
    bargauge.Panel, heatmap.Panel, stat.Panel, statetimeline.Panel, timeseries.Panel,
)  # fmt: skip

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH = 24


def rate(metric: str, *by: str, where: str = STORE) -> str:
    """What a counter grows in a second, summed up by these labels."""
    return _by(*by) + f" (rate({metric}{{{where}}}[$__rate_interval]))"


def level(metric: str, *by: str, where: str) -> str:
    """A gauge, summed up by these labels."""
    return f"{_by(*by)} ({metric}{{{where}}})"


def growth(metric: str, *by: str, where: str, window: str = "15m") -> str:
    """What a counter grew in a window, summed up by these labels."""
    return f"{_by(*by)} (increase({metric}{{{where}}}[{window}]))"


def quantile(share: float, metric: str, *by: str, where: str = STORE) -> str:
    """A quantile of a histogram; `metric` without `_bucket`."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', 'le', *by, where=where)})"


def mean(metric: str, *by: str, where: str = STORE) -> str:
    """The mean of what a histogram has observed."""
    total, number = (rate(f"{metric}_{part}", *by, where=where) for part in ("sum", "count"))
    return f"{total} / {number}"


def _by(*labels: str) -> str:
    return f"sum by ({', '.join(labels)})" if labels else "sum"


Queries = Mapping[str, str]
"""Expressions of Prometheus by their legend, in which `{{label}}` stands for a label's value."""


def plot(
    title: str,
    description: str,
    queries: Queries,
    unit: str = "short",
    *,
    width: int = 12,
    steps: Steps = (),
    stacked: bool = False,
    top: float | None = None,
) -> timeseries.Panel:
    """Lines over time; `steps` are drawn as dashed lines."""
    legend = (
        VizLegendOptions()
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "max"])
    )
    tooltip = VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING)
    panel = _panel(timeseries.Panel(), title, description, queries, width, 8)
    panel = panel.unit(unit).min(0).legend(legend).tooltip(tooltip)
    panel = panel.show_points(VisibilityMode.NEVER).fill_opacity(30 if stacked else 8)
    if stacked:
        panel = panel.stacking(StackingConfig().mode(StackingMode.NORMAL))
    if top is not None:
        panel = panel.max(top)
    if steps:
        style = GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds(_thresholds(steps)).thresholds_style(style)
    return panel


def number(
    title: str,
    description: str,
    expression: str,
    unit: str = "short",
    *,
    steps: Steps = ((None, BLUE),),
    decimals: int | None = None,
    legend: str = "",
    width: int = 4,
) -> stat.Panel:
    """A number as it is now, in the colour of its step."""
    panel = _panel(stat.Panel(), title, description, {legend: expression}, width, 4)
    panel = (
        panel.unit(unit)
        .thresholds(_thresholds(steps))
        .color_mode(BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    )
    return panel if decimals is None else panel.decimals(decimals)


def bars(
    title: str, description: str, queries: Queries, unit: str, steps: Steps, *, width: int = 12
) -> bargauge.Panel:
    """A bar for each series, as it is now."""
    panel = _panel(bargauge.Panel(), title, description, queries, width, 8)
    return (
        panel.unit(unit)
        .min(0)
        .thresholds(_thresholds(steps))
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    )


def states(
    title: str, description: str, queries: Queries, names: Mapping[int, tuple[str, str]],
    *, width: int = 24,
) -> statetimeline.Panel:  # fmt: skip
    """States over time; `names` has the name and colour of each value."""
    found = {str(value): ValueMappingResult(*names[value]) for value in names}
    panel = _panel(statetimeline.Panel(), title, description, queries, width, 6)
    panel = panel.line_width(0).fill_opacity(70)
    return panel.mappings([ValueMap(found)]).thresholds(_thresholds(((None, BLUE),)))


def distribution(
    title: str, description: str, expression: str, unit: str, *, width: int = 12
) -> heatmap.Panel:
    """A histogram over time; the expression is a sum by `le`."""
    panel = heatmap.Panel().title(title).description(description).datasource(_SOURCE)
    query = Dataquery().expr(expression).legend_format("{{le}}").range().ref_id("A")
    query = query.format(PromQueryFormat.HEATMAP).datasource(_SOURCE)
    return (
        panel.with_target(query)
        .calculate(False)
        .y_axis(YAxisConfig().unit(unit))
        .color(HeatmapColorOptions().scheme("Spectral").steps(64))
        .height(8)
        .span(width)
    )


def _panel(
    panel: Panel, title: str, description: str, queries: Queries, width: int, height: int
) -> Panel:
    panel.title(title).description(description).datasource(_SOURCE).span(width).height(height)
    for name, (legend, expression) in zip("ABCDEFGH", queries.items(), strict=False):
        query = Dataquery().expr(expression).legend_format(legend or "__auto")
        panel.with_target(query.range().ref_id(name).datasource(_SOURCE))
    return panel


def _thresholds(steps: Steps) -> ThresholdsConfig:
    made = [Threshold(value=value, color=colour) for value, colour in steps]
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(made)


def board(
    uid: str, title: str, description: str, rows: Mapping[str, Sequence[Builder[models.Panel]]]
) -> Dashboard:
    """A dashboard of rows of panels, with the variables and links that all have."""
    made = (
        Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["xkiproxy"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            DashboardLink("xkiproxy")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["xkiproxy"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("namespace", "Namespace", "xkiproxy_build_info"))
        .with_variable(_variable("job", "Job", "xkiproxy_build_info", 'namespace=~"$namespace"'))
        .with_variable(_variable("instance", "Instance", "xkiproxy_build_info", INSTALLATION))
        .with_variable(_variable("keystore", "Key store", "xkiproxy_requests_total", HERE))
        .with_variable(_variable("kmi", "KMI", "xkiproxy_kmi_state", HERE))
    )
    ids = count(1)
    for name, panels in rows.items():
        made = made.with_row(Row(name).id(next(ids)))
        for panel in panels:
            panel.build().id_val = next(ids)
            made = made.with_panel(panel)
    return made


def _variable(name: str, label: str, metric: str, where: str = "") -> QueryVariable:
    """One or several values of a label; all at first, also the empty one.

    `where`: only values of these series are offered.
    """
    series = f"{metric}{{{where}}}" if where else metric
    return (
        QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(f"label_values({series}, {name})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(text="All", value="$__all", selected=True))
    )
