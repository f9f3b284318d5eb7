"""Make every row of a table; run it again after a crash or a change, and it goes on.

python demo/examples/batch_csv.py demo/examples/prompts.csv out/ --set steps=8
"""

import argparse
import sys
from typing import Any

from fastdiff.batch import run


def show(event: dict[str, Any]) -> None:
    if event["event"] == "done":
        print(f"{event['finished']} of {event['jobs']}: {event['file']}, "
              f"{event['seconds_left']:.0f} s left")
    elif event["event"] == "failed":
        print(f"{event['where']}: {event['error']}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="columns are fields: prompt, seed, density, ...")
    parser.add_argument("out")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--processes", type=int, default=1, help="workers, one on each GPU")
    args = parser.parse_args()
    defaults = dict(word.split("=", 1) for word in args.set)
    outcome = run(args.table, args.out, defaults=defaults, processes=args.processes,
                  on_event=show)
    print(f"{outcome.made} made, {outcome.skipped} were there; see {args.out}/index.html")
    sys.exit(0 if outcome.ok else 1)


if __name__ == "__main__":
    main()
