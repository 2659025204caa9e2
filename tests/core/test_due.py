"""Which steps are exported by policy: the best as they come, the named ones, never an unhealthy."""

from dataclasses import replace

from ray_ckpt.core.due import due_exports
from ray_ckpt.core.observation import CheckpointView, Observation
from ray_ckpt.core.policy import ExportPolicy, KeepConfig, LifecyclePolicy
from ray_ckpt.core.reconcile import plan
from tests.core.worlds import COPY, after_success, manifest, observe, titles, view, with_export

BEST = LifecyclePolicy(export=(ExportPolicy(name="hf", best=1, last_step=False),))


def due(observed: Observation) -> dict[int, list[str]]:
    return {step: [d.reason for d in found] for step, found in due_exports(observed).items()}


def test_each_line_of_the_policy_asks_for_its_steps() -> None:
    policy = LifecyclePolicy(export=(ExportPolicy(name="hf", every_steps=10, steps=(7,)),))
    last = replace(view(12), manifest=manifest(12, is_last_step=True))
    assert due(observe(view(5), view(7), view(10), last, policy=policy)) == {
        5: [],
        7: ["named in steps"],
        10: ["every 10 steps"],
        12: ["last step"],
    }


def test_a_step_is_exported_when_it_becomes_the_best_and_stays_exported() -> None:
    first, worse, better = view(1, loss=2.0), view(2, loss=3.0), view(3, loss=1.0)
    observed = observe(first, worse, policy=BEST)
    assert titles(observed) == ["export step-1 hf"]
    observed = with_export(observed, first, "hf")
    observed = replace(observed, checkpoints=(first, worse, better))
    assert due(observed) == {
        1: ["among the best when it was exported"],
        2: [],
        3: ["best 1 by loss (min)"],
    }
    assert titles(observed) == ["export step-3 hf"]


def test_an_export_that_never_began_is_dropped_for_a_better_step() -> None:
    observed = observe(view(1, loss=2.0), view(3, loss=1.0), policy=BEST)
    assert titles(observed) == ["export step-3 hf"]


def test_an_older_best_still_gets_its_required_copy_before_it_goes() -> None:
    first, others = view(1, loss=2.0), (view(2, loss=1.0), view(3, loss=3.0), view(4, loss=4.0))
    policy = replace(BEST, publish=(COPY,), keep=KeepConfig(latest=2))
    observed = with_export(observe(first, *others, policy=policy), first, "hf")
    assert (
        "not done yet: publish step-1 hf to /copies" in plan(observed, now=0.0).verdicts[0].reasons
    )
    copied = next(a for a in plan(observed, now=0.0).actions if a.step == 1)
    assert "purge step-1" in titles(after_success(observed, copied))


def test_purging_the_best_does_not_make_the_second_best_worth_an_export() -> None:
    gone, here = view(1, loss=1.0), view(2, loss=2.0)
    observed = with_export(observe(here, policy=BEST), gone, "hf")
    assert due(observed) == {2: []}


def test_a_larger_value_may_be_better() -> None:
    policy = LifecyclePolicy(
        export=(ExportPolicy(name="hf", best=2, metric="acc", order="max", last_step=False),)
    )
    observed = observe(view(1, acc=0.1), view(2, acc=0.9), view(3, acc=0.5), policy=policy)
    assert titles(observed) == ["export step-2 hf", "export step-3 hf"]


def test_an_unhealthy_or_damaged_step_is_never_the_best() -> None:
    good = view(1, loss=5.0)
    sick = replace(view(2), manifest=replace(manifest(2, loss=0.1), non_finite=("w",)))
    torn = replace(view(3, loss=0.2), problem="a file is missing")
    assert due(observe(good, sick, torn, policy=BEST)) == {
        1: ["best 1 by loss (min)"],
        2: [],
        3: [],
    }


def test_a_metric_that_nobody_reports_is_a_problem_once_there_is_a_step() -> None:
    policy = replace(BEST, keep=KeepConfig(best=1, best_metric="acc"))

    def problems(*views: CheckpointView) -> tuple[str, ...]:
        return plan(observe(*views, policy=policy), now=0.0).problems

    assert problems(view(0)) == ()
    assert problems(view(1, loss=1.0)) == (
        "keep: best by acc, but none of 1 checkpoints reports it; they report: loss",
    )
    assert [p.partition(",")[0] for p in problems(view(1))] == [
        "export hf: best by loss",
        "keep: best by acc",
    ]
