"""`python -m isa_lite` lists the commands, `python -m isa_lite NAME ...` runs one; see
`isa_lite.commands`.
"""

from isa_lite.commands import main

if __name__ == "__main__":
    main()
