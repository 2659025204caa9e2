"""The verbs of `ray-ckpt`, and what their ends mean to a script.

exit 0  good        exit 2  usage: the message says what to type instead
exit 1  a finding   exit 3  transient: the same command may succeed later
                    exit 4  authorisation
"""

import logging
import sys

import click

from ray_ckpt.cli import act, export, inspect, queue
from ray_ckpt.cli.backfill import backfill
from ray_ckpt.cli.copies import copies
from ray_ckpt.cli.demo import demo
from ray_ckpt.cli.diff import diff
from ray_ckpt.cli.doctor import doctor
from ray_ckpt.cli.du import du
from ray_ckpt.cli.events import events
from ray_ckpt.cli.fetch import fetch
from ray_ckpt.cli.gc import gc
from ray_ckpt.cli.importing import import_
from ray_ckpt.cli.plan import plan
from ray_ckpt.cli.purge_hub import purge_hub
from ray_ckpt.cli.report import report
from ray_ckpt.cli.submit import submit
from ray_ckpt.cli.watch import watch
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.version import __version__

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """The whole life of a checkpoint: save, verify, export, publish, resume, purge.

    ROOT is where a run keeps its checkpoints: a path or s3://bucket/prefix. Every verb works from
    it alone. Verbs that need compute run on the cluster that RAY_ADDRESS names, else in this
    process.
    """


VERBS = (
    demo,
    doctor,
    submit,
    inspect.ls,
    watch,
    inspect.show,
    inspect.verify,
    diff,
    copies,
    inspect.resume_plan,
    plan,
    events,
    report,
    act.adopt,
    backfill,
    import_,
    export.export,
    export.publish,
    fetch,
    act.pin,
    act.unpin,
    act.purge,
    purge_hub,
    act.undo,
    du,
    gc,
    act.save_now,
    queue.drain,
    queue.retry,
    queue.cancel,
)
for _verb in VERBS:
    cli.add_command(_verb)


def main() -> None:
    """Runs one verb; an error of ours is told in full and becomes its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        sys.exit(cli(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except RayCkptError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; every step that was committed is safe", err=True)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
