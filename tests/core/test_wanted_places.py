"""Where an export goes once it is made."""

from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.observation import Request
from ray_ckpt.core.policy import LifecyclePolicy, PublishPolicy
from ray_ckpt.core.wanted import export_action, places_after, publish_action
from tests.core.worlds import EXPORT_ALL, HF, observe, view

COPIES = tuple(PublishPolicy(export="hf", to=to) for to in ("/copies", "hf://org/model"))
POLICY = LifecyclePolicy(export=EXPORT_ALL, publish=COPIES)


def test_policies_and_people_say_where_each_place_once() -> None:
    asked = (
        Request(step=10, export=HF, destination="s3://bucket/a"),
        Request(step=10, export=HF, destination="/copies"),
        Request(step=10, export=HF),
        Request(step=20, export=HF, destination="/of-another-step"),
        Request(step=10, export=ExportSpec(name="other"), destination="/of-another-export"),
    )
    observed = observe(view(10), policy=POLICY, requests=asked)
    places = places_after(export_action(view(10), HF), observed)
    assert places == ("/copies", "hf://org/model", "s3://bucket/a")


def test_nothing_goes_on_after_a_copy() -> None:
    observed = observe(view(10), policy=POLICY)
    assert places_after(publish_action(view(10), HF, "/copies"), observed) == ()
