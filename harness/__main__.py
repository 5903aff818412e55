"""``python -m harness`` is ``shardproof``."""

from harness.shardproof.command import main

if __name__ == "__main__":  # each rank imports the main module anew, and needs none of the command line
    main()
