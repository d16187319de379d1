"""The command ``bitwright``: one subcommand per verb."""
