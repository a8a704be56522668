"""What a Python process runs that is to be the `zoo` command."""

COMMAND = """
sys.path.append(sys.argv.pop(1))
try:
    from zoo.cli import main
except KeyboardInterrupt:  # Ctrl-C while torch is imported
    sys.exit(130)
main()
"""
"""Takes the folder where this `zoo` lies, installed or not, as the next argument."""

__all__ = ["COMMAND"]
