"""The command line: compose a config with Hydra, and run its task. See `python launch.py --help`."""

import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    # Ctrl-C while libraries are imported exits like RunPreempted; there is nothing to clean up yet.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    # This process only tokenizes: transformers would import torch, which takes seconds, or warn that it is missing.
    os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwen_cl.config.errors import EXIT_INTERRUPTED, RunFailed, RunPreempted, UserError, caused_by_interrupt
from qwen_cl.config.help_text import read_help
from qwen_cl.config.hydra_errors import explain, refuse_added_keys
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.override_text import quote_arguments
from qwen_cl.config.renamed_keys import rename_overrides
from qwen_cl.config.store import register_schemas

register_schemas()


CONF = Path(__file__).parent / "conf"
failures: list[UserError | RunFailed] = []


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def launch(cfg: DictConfig) -> None:
    """Run the task of one composed config; Hydra calls it once, or per job of a basic multirun."""
    from qwen_cl.runs.folder import remove_if_empty

    try:
        from qwen_cl.run import run

        refuse_added_keys(cfg)
        run(OmegaConf.to_object(cfg), invocation())
    except OmegaConfBaseException as error:
        fail(UserError(explain(error)))
    except OSError as error:
        fail(RunFailed(f"{error.strerror}: {error.filename}"))
    except (UserError, RunFailed) as error:
        fail(error)
        if isinstance(error, RunPreempted):
            raise KeyboardInterrupt from error
    finally:
        remove_if_empty(Path(HydraConfig.get().runtime.output_dir))


def invocation() -> Invocation:
    """Return Hydra's state, which only this file reads from Hydra."""
    state = HydraConfig.get()
    return Invocation(
        output_dir=Path(state.runtime.output_dir),
        overrides=list(state.overrides.task),
        typed=cast(list[str], OmegaConf.to_container(state.overrides.task)),
        runtime=cast(dict[str, Any], OmegaConf.to_container(state.runtime)),
    )


def fail(error: UserError | RunFailed) -> None:
    """Print an error, and record it for the exit code; other jobs of a multirun still run."""
    print(error, file=sys.stderr)
    failures.append(error)


def main() -> int:
    """Run the command line, and return the exit code."""
    if {"-h", "--help"} & set(sys.argv[1:]):  # Hydra's own --help takes seconds to list the groups
        print(read_help(CONF), end="")
        return 0
    previous = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return launch_all()
    except BaseException as error:
        if not caused_by_interrupt(error):
            raise
        return next((each.exit_code for each in failures if isinstance(each, RunPreempted)), EXIT_INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, previous)


def launch_all() -> int:
    """Run Hydra with the command line's overrides, and return the exit code."""
    try:
        sys.argv[1:] = quote_arguments(rename_overrides(sys.argv[1:]))
    except UserError as error:
        fail(error)
        return error.exit_code
    # Otherwise Hydra prints its own message and exits with 1; raised, its errors are printed like all others.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        launch()
    except (HydraException, OmegaConfBaseException) as error:
        fail(UserError(explain(error)))
    except (UserError, RunFailed) as error:  # raised by a sweep; those of a run are handled in launch()
        fail(error)
    except OSError as error:
        fail(UserError(f"hydra.run.dir ({error.filename}) cannot be created: {error.strerror}; choose another folder"))
    return max((error.exit_code for error in failures), default=0)


if __name__ == "__main__":
    sys.exit(main())
