"""``python -m harness`` is ``shardproof``."""

from harness.cli import main

if __name__ == "__main__":
    main()
