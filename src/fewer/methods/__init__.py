"""One file per published method. Methods import core and nothing else; hosts and methods never meet here."""
