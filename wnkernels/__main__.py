import sys


def main(arguments):
    match arguments:
        case ["info"]:
            from ._info import report

            print(report())
            return 0
        case ["papers", *rest]:
            from .papers.command import main as papers

            return papers(rest)
    print("usage: python -m wnkernels info | papers [--help]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
