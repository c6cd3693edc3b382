from prunus.cli import main

main()
