"""Money: cards on file, charges, and the gateway that moves it."""
