from longwave.cli import main

main()
