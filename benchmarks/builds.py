"""How long every loop of the zoo takes from its declaration to C++, and from the cache: `python -m benchmarks.builds`.

Each op is lowered and built alone, in an empty cache; then looked up again, as a new process would. Seconds of CPU
stand beside those by the clock: on a busy machine only they mean anything. Streams have an op for whole chunks and one
for calls that begin inside a chunk, which is built when it is first needed.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from unittest import mock

from nestloop import zoo
from nestloop.lang.schedule import Program
from nestloop.lowering import lower, names
from nestloop.lowering.runtime import compiler
from nestloop.targets import trial_sizes


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of CPU, those of the compiler included."""

    def spent() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    wall, cpu = time.perf_counter(), spent()
    function()
    return time.perf_counter() - wall, spent() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loops", nargs="*", help="names of loops; all of the zoo by default")
    parser.add_argument("--width", type=int, default=64, help="features of a head")
    given = parser.parse_args()
    print(f"{compiler.find().version}\n{'seconds by the clock (of CPU)':<36}{'lowered':>16}{'built':>16}{'again':>10}")
    for loop in zoo.loops():
        spec = names.safe(loop.spec)
        if spec.is_kernel_estimator or (given.loops and loop.__name__ not in given.loops):
            continue
        sizes = trial_sizes(spec, dict.fromkeys(("d", "dk", "dv", "dx", "dy"), given.width))
        tokens = sizes["N"] if spec.sees_grid else None
        sizes = {name: size for name, size in sizes.items() if name not in ("B", "N", "n")}
        parts = [""] if not spec.streams else ["scan", "inside"]
        parts = ["update", "read"] if isinstance(spec.schedule, Program) else parts
        for part in parts:
            with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", NESTLOOP_CACHE=folder):

                def plan(spec=spec, sizes=sizes, tokens=tokens, part=part) -> lower.Plan:
                    lower._PLANS.clear()
                    return lower.plan_for(spec, sizes, tokens, False, False, part=part)

                def build() -> None:
                    made = plan()
                    if made.native is not None:
                        compiler.loaded(made.name, made.native.text, "float")

                times = [timed(plan), timed(build), timed(build)]
            texts = [f"{wall:.2f} ({cpu:.2f})" for wall, cpu in times[:2]]
            print(f"{loop.__name__:<28}{part:<8}{texts[0]:>16}{texts[1]:>16}{times[2][0]:>10.3f}", flush=True)


if __name__ == "__main__":
    main()
