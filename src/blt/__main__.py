from blt.cli import main

main()
