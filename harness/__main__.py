"""``python -m harness`` is ``shardproof``."""

if __name__ == "__main__":
    # Here, because each rank imports the main module anew, and needs none of the command line.
    from harness.cli import main

    main()
