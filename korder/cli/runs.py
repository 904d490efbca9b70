"""The commands that take a run file: run, plan, validate; and schema, which says what may stand in one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from korder.cli.output import DONE, FAILED, Format, FormatOption, TerminalProgress, print_json, reported
from korder.errors import SpecError

if TYPE_CHECKING:
    from korder.experiments.attend import ExactNeed, Report
    from korder.planning.plan import Plan
    from korder.planning.regime import Regime
    from korder.problem import Problem
    from korder.spec.runs import AttendRun, Run

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A run file: TOML, JSON or YAML.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for example attention.order=3; repeatable."),
]
BackendOption = Annotated[str | None, typer.Option("--backend", help="Run by this backend or not at all.")]


def run_file(
    file: FileArgument,
    overrides: SetOption = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Directory for the results.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of an earlier run.")] = False,
    backend: BackendOption = None,
    form: FormatOption = Format.text,
) -> None:
    """Run what a file describes, check it, and write the results."""
    with reported(form):
        run = _read(file, overrides, backend, output, overwrite)
        if run.kind == "benchmark":
            from korder.cli.machine import run_benchmark

            run_benchmark(run, form)
            return
        report, files = _attend(run, form)
        if form is Format.json:
            from korder.experiments.record import record_of

            print_json({**record_of(report), "files": [str(path) for path in files]})
        else:
            typer.echo(_report_text(report, files))
    raise typer.Exit(DONE if report.passed else FAILED)


def plan_file(
    file: FileArgument,
    overrides: SetOption = None,
    named: BackendOption = None,
    form: FormatOption = Format.text,
) -> None:
    """Say how a file would be computed, at which cost and by whom; nothing is computed."""
    with reported(form):
        run = _attend_only(_read(file, overrides, named), "plan")
        from korder.dispatch.registry import default_registry
        from korder.dispatch.select import select
        from korder.experiments.attend import plans_of
        from korder.experiments.placement import placement_for

        placement = placement_for(run.backend)
        with TerminalProgress() as progress:
            progress.stage("measuring the scores")
            plans = plans_of(run, placement)
        problem = plans[0].problem
        if run.attention.chooses:
            from korder.dispatch.choosing import ranked

            candidates, turned_down = ranked(default_registry(), problem, placement.kind, run.backend)
            plans, rank = tuple(candidate.plan for candidate in candidates), 0
            backend, label = ", ".join(dict.fromkeys(candidates[0].backends)), "or"
        else:
            chosen = select(default_registry(), plans, array_kind=placement.kind, requested=run.backend)
            backend, rank, turned_down = chosen.backend.name, chosen.rank, list(chosen.rejected)
            label = "if that does not do"
        regime = _regime_of(problem)
        if form is Format.json:
            found = {"backend": backend, "chosen": rank, "rejected": list(map(str, turned_down))}
            theory = None if regime is None else asdict(regime)
            print_json({**found, "plans": [_plan_record(plan) for plan in plans], "regime": theory})
            return
        typer.echo(plans[rank].explain())
        typer.echo(f"\nbackend: {backend}")
        for plan in (*plans[:rank], *plans[rank + 1 :]):
            typer.echo(f"{label}: {_plan_line(plan)}")
        if regime is not None:
            typer.echo(f"\nregime of entries that reach these scores:\n{regime.explain()}")


def validate_file(
    file: FileArgument,
    overrides: SetOption = None,
    form: FormatOption = Format.text,
) -> None:
    """Check a file, and that the shapes of its data fit, without computing anything."""
    with reported(form):
        run = _read(file, overrides)
        text = "valid benchmark"
        if run.kind == "attend":
            from korder.experiments.data import check_problem, outline

            text = f"valid: {check_problem(run, outline(run)).describe()}"
        if form is Format.json:
            print_json({"file": str(file), "kind": run.kind, "valid": True, "run": run.model_dump(mode="json")})
        else:
            typer.echo(f"{file}: {text}")


def print_schema(form: FormatOption = Format.text) -> None:
    """Print the JSON Schema of run files, in either format."""
    from korder.spec.files import run_schema

    print_json(run_schema())


def _read(
    file: Path,
    overrides: list[str] | None,
    backend: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> Run:
    """Read a file with every override of the command line; options win over --set."""
    from korder.spec.files import read_run

    options: dict[str, Any] = {} if backend is None else {"backend": backend}
    if output is not None:
        options["output.directory"] = str(output)
    if overwrite:
        options["output.overwrite"] = True
    return read_run(file, overrides or (), options)


def _attend_only(run: Run, command: str) -> AttendRun:
    if run.kind == "attend":
        return run
    raise SpecError(
        f"`korder {command}` takes a run file that attends.",
        code="spec-kind",
        expected='kind = "attend"',
        got=f'kind = "{run.kind}"',
        hint="`korder bench FILE` runs a benchmark.",
    )


def _attend(run: AttendRun, form: Format) -> tuple[Report, list[Path]]:
    from korder.experiments.attend import run_attend
    from korder.experiments.results import check_output, write_report

    check_output(run.output)
    with TerminalProgress(form) as progress:
        report = run_attend(run, progress)
        progress.stage("writing the results")
        return report, write_report(report)


def _plan_record(plan: Plan) -> dict[str, Any]:
    degree = None if plan.polynomial is None else plan.polynomial.degree
    text = {"problem": plan.problem.describe(), "explain": plan.explain(), "notes": list(plan.notes)}
    return {"method": plan.method, "degree": degree, "cost": asdict(plan.cost), **text}


def _regime_of(problem: Problem) -> Regime | None:
    """Return what theory says of as many queries with scores as large as those measured; None where none were."""
    from korder.planning.regime import regime

    found = problem.statistics
    if found is None or problem.queries < 2:
        return None
    largest = max(abs(found.score_low), abs(found.score_high))
    return regime(problem.queries, problem.order, min(largest ** (1.0 / (problem.order + 1)), 1e40))


def _plan_line(plan: Plan) -> str:
    from korder.planning.explain import count, size

    return f"{plan.name}, {count(plan.cost.flops)} flop, {size(plan.cost.peak_memory)}"


def _report_text(report: Report, files: list[Path]) -> str:
    assert report.result.provenance is not None
    blocks = [report.plan.explain()]
    done = f"backend: {report.result.provenance.backend}, attention in {report.timings['attend_seconds']:.3g} s"
    blocks.append("\n".join([done, *(f"replanned: {reason}" for reason in report.result.provenance.replanned)]))
    if report.answer:
        blocks.append("\n".join(report.answer))
    accuracy = _accuracy_lines(report)
    if accuracy:
        blocks.append("\n".join(accuracy))
    lines = [f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}" for check in report.checks]
    blocks.append("\n".join([*lines, *(f"note: {text}" for text in report.warnings)]))
    if files:
        blocks.append("written: " + ", ".join(str(path) for path in files))
    return "\n\n".join(blocks)


def _accuracy_lines(report: Report) -> list[str]:
    from korder.experiments.record import certificate_summary

    summary = certificate_summary(report.result.certificate)
    lines = []
    if summary is not None:
        lines.append(
            f"certificate ({summary['kind']}): error at most {_short(summary['bound_largest'])} in every row, "
            f"{_short(summary['bound_median'])} in the median row; scores within "
            f"[{_short(summary['score_low'])}, {_short(summary['score_high'])}]"
        )
    if report.measured is not None:
        measured = report.measured
        lines.append(
            f"measured: error at most {measured.errors.max():.3g} in {len(measured.positions)} rows computed exactly, "
            f"which took {measured.seconds:.3g} s"
        )
    return lines + ([_exact_line(report, report.exact_need)] if report.exact_need is not None else [])


def _exact_line(report: Report, need: ExactNeed) -> str:
    from korder.planning.explain import count, size

    cost = need.plan.cost
    text = (
        f"exact would need: {count(cost.flops)} flop and {count(cost.exponentials)} exponentials, at least "
        f"{_duration(need.seconds)} at the {need.flop_per_second / 1e9:.3g} GF/s of a matrix product here, in "
        f"{size(cost.peak_memory)}"
    )
    if report.measured is None or not report.measured.positions:
        return text
    problem = report.plan.problem
    per_row = report.measured.seconds / len(report.measured.positions)
    whole = per_row * problem.batch * problem.heads * problem.queries
    return f"{text}; {_duration(whole)} at the rate of the rows measured"


def _duration(seconds: float) -> str:
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.3g} s"


def _short(value: float | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
