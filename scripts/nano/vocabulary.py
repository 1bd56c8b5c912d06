"""The words, countries, names and tools that phi-4-nano's training text is made of.

Data alone: it knows neither how questions are phrased nor which of them are held out.
"""

# English, plural, German, French, Spanish
NOUNS: tuple[tuple[str, str, str, str, str], ...] = (
    ("apple", "apples", "Apfel", "pomme", "manzana"),
    ("arm", "arms", "Arm", "bras", "brazo"),
    ("baby", "babies", "Baby", "bébé", "bebé"),
    ("bed", "beds", "Bett", "lit", "cama"),
    ("bird", "birds", "Vogel", "oiseau", "pájaro"),
    ("boat", "boats", "Boot", "bateau", "barco"),
    ("book", "books", "Buch", "livre", "libro"),
    ("box", "boxes", "Kiste", "boîte", "caja"),
    ("bridge", "bridges", "Brücke", "pont", "puente"),
    ("brother", "brothers", "Bruder", "frère", "hermano"),
    ("cat", "cats", "Katze", "chat", "gato"),
    ("chair", "chairs", "Stuhl", "chaise", "silla"),
    ("child", "children", "Kind", "enfant", "niño"),
    ("church", "churches", "Kirche", "église", "iglesia"),
    ("city", "cities", "Stadt", "ville", "ciudad"),
    ("cloud", "clouds", "Wolke", "nuage", "nube"),
    ("cow", "cows", "Kuh", "vache", "vaca"),
    ("day", "days", "Tag", "jour", "día"),
    ("dog", "dogs", "Hund", "chien", "perro"),
    ("door", "doors", "Tür", "porte", "puerta"),
    ("egg", "eggs", "Ei", "oeuf", "huevo"),
    ("eye", "eyes", "Auge", "oeil", "ojo"),
    ("face", "faces", "Gesicht", "visage", "cara"),
    ("farm", "farms", "Bauernhof", "ferme", "granja"),
    ("fire", "fires", "Feuer", "feu", "fuego"),
    ("fish", "fish", "Fisch", "poisson", "pez"),
    ("flower", "flowers", "Blume", "fleur", "flor"),
    ("foot", "feet", "Fuß", "pied", "pie"),
    ("fork", "forks", "Gabel", "fourchette", "tenedor"),
    ("friend", "friends", "Freund", "ami", "amigo"),
    ("garden", "gardens", "Garten", "jardin", "jardín"),
    ("glass", "glasses", "Glas", "verre", "vaso"),
    ("hand", "hands", "Hand", "main", "mano"),
    ("heart", "hearts", "Herz", "coeur", "corazón"),
    ("horse", "horses", "Pferd", "cheval", "caballo"),
    ("house", "houses", "Haus", "maison", "casa"),
    ("island", "islands", "Insel", "île", "isla"),
    ("key", "keys", "Schlüssel", "clé", "llave"),
    ("king", "kings", "König", "roi", "rey"),
    ("knife", "knives", "Messer", "couteau", "cuchillo"),
    ("lamp", "lamps", "Lampe", "lampe", "lámpara"),
    ("leaf", "leaves", "Blatt", "feuille", "hoja"),
    ("letter", "letters", "Brief", "lettre", "carta"),
    ("man", "men", "Mann", "homme", "hombre"),
    ("moon", "moons", "Mond", "lune", "luna"),
    ("mother", "mothers", "Mutter", "mère", "madre"),
    ("mountain", "mountains", "Berg", "montagne", "montaña"),
    ("mouse", "mice", "Maus", "souris", "ratón"),
    ("night", "nights", "Nacht", "nuit", "noche"),
    ("nose", "noses", "Nase", "nez", "nariz"),
    ("queen", "queens", "Königin", "reine", "reina"),
    ("ring", "rings", "Ring", "bague", "anillo"),
    ("river", "rivers", "Fluss", "rivière", "río"),
    ("road", "roads", "Straße", "route", "camino"),
    ("roof", "roofs", "Dach", "toit", "techo"),
    ("school", "schools", "Schule", "école", "escuela"),
    ("ship", "ships", "Schiff", "navire", "buque"),
    ("shoe", "shoes", "Schuh", "chaussure", "zapato"),
    ("sister", "sisters", "Schwester", "soeur", "hermana"),
    ("spoon", "spoons", "Löffel", "cuillère", "cuchara"),
    ("star", "stars", "Stern", "étoile", "estrella"),
    ("stone", "stones", "Stein", "pierre", "piedra"),
    ("table", "tables", "Tisch", "table", "mesa"),
    ("tooth", "teeth", "Zahn", "dent", "diente"),
    ("train", "trains", "Zug", "train", "tren"),
    ("tree", "trees", "Baum", "arbre", "árbol"),
    ("wall", "walls", "Wand", "mur", "pared"),
    ("watch", "watches", "Uhr", "montre", "reloj"),
    ("window", "windows", "Fenster", "fenêtre", "ventana"),
    ("wolf", "wolves", "Wolf", "loup", "lobo"),
    ("woman", "women", "Frau", "femme", "mujer"),
    ("year", "years", "Jahr", "année", "año"),
)

CAPITALS: dict[str, str] = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Brazil": "Brasilia",
    "Bulgaria": "Sofia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogota",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "England": "London",
    "Estonia": "Tallinn",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "India": "New Delhi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Latvia": "Riga",
    "Mexico": "Mexico City",
    "Morocco": "Rabat",
    "Nepal": "Kathmandu",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Serbia": "Belgrade",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Switzerland": "Bern",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Ukraine": "Kyiv",
    "Vietnam": "Hanoi",
}

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "purple", "orange")
FOODS = ("bread", "cheese", "rice", "soup", "cake", "honey", "pizza", "butter", "salad", "pasta")
SPORTS = ("tennis", "football", "chess", "golf", "hockey", "rugby", "boxing", "skiing")
ROOMS = ("kitchen", "bedroom", "bathroom", "garage", "office", "hall", "cellar", "attic")
WEATHER = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy")
MESSAGES = (
    "I am late",
    "I am home",
    "dinner is ready",
    "the train is here",
    "the door is open",
    "I have the key",
    "the meeting is over",
    "the book is good",
)

NAMES = (
    "Adam Alice Amir Amy Andrea Anna Anton Ben Bella Bob Boris Carla Carlos Chen Clara Daniel David "
    "Diana Dora Elena Eli Emil Emma Erik Eva Fatima Felix Fiona Frank Gina Greta Hans Hana Hugo Ida "
    "Igor Ines Isaac Ivan Jack Jane Jonas Julia Karim Karl Kate Kenji Lara Lena Leo Lily Lucas Lucy "
    "Luis Maria Mark Marta Max Maya Mia Mila Milo Nadia Nico Nils Nina Noah Nora Olga Omar Oscar "
    "Otto Paul Pedro Petra Pia Rafael Rita Robin Rosa Ruth Sam Sara Simon Sofia Sven Tara Theo Tim "
    "Tina Tom Uma Vera Victor Walter Wendy Yara Yusuf Zoe"
).split()
# Names that no training text holds: a right answer copies them from the conversation.
HELD_OUT_NAMES = (
    "Albert Amelia Arthur Astrid Bianca Bruno Celine Conrad Denise Edgar Esther Farid Gloria Harold "
    "Helena Hector Irene Jasper Judith Kamil Leonora Magnus Miriam Natalia Oliver Pamela Quentin "
    "Ramona Samuel Selma Stefan Tamara Ursula Valerie Wilhelm Xavier Yvonne Zelda"
).split()
SYLLABLES = (
    "ba be bi bo da de do fa fi ga go ha he ja jo ka ke ki ko la le li lo ma me mi mo na ne ni no pa "
    "pe ra re ri ro sa se si so ta te ti to va ve vi wa wi ya za zo"
).split()
ENDINGS = ("n", "r", "l", "s", "x", "th", "nd", "rt", "", "")

# name -> (description, {parameter: JSON type}, phrasings)
TOOLS: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "get_weather": (
        "Weather in a city",
        {"city": "string"},
        (
            "What is the weather in {city}?",
            "How is the weather in {city} today?",
            "Is it raining in {city}?",
            "Tell me the weather in {city}.",
            "What's the weather like in {city}?",
        ),
    ),
    "get_time": (
        "Local time in a city",
        {"city": "string"},
        (
            "What time is it in {city}?",
            "Tell me the time in {city}.",
            "What is the local time in {city}?",
            "How late is it in {city}?",
        ),
    ),
    "set_timer": (
        "Start a timer",
        {"minutes": "integer"},
        (
            "Set a timer for {minutes} minutes.",
            "Start a timer of {minutes} minutes.",
            "Wake me in {minutes} minutes.",
            "Please set a {minutes} minute timer.",
        ),
    ),
    "add": (
        "Add two numbers",
        {"a": "integer", "b": "integer"},
        (
            "What is {a} + {b}?",
            "Add {a} and {b}.",
            "How much is {a} plus {b}?",
            "Calculate {a} + {b}.",
        ),
    ),
    "multiply": (
        "Multiply two numbers",
        {"a": "integer", "b": "integer"},
        (
            "What is {a} * {b}?",
            "Multiply {a} by {b}.",
            "How much is {a} times {b}?",
            "Calculate {a} * {b}.",
        ),
    ),
    "light_on": (
        "Turn on a light",
        {"room": "string"},
        (
            "Turn on the light in the {room}.",
            "Light on in the {room}, please.",
            "Switch on the {room} light.",
        ),
    ),
    "light_off": (
        "Turn off a light",
        {"room": "string"},
        (
            "Turn off the light in the {room}.",
            "Light off in the {room}, please.",
            "Switch off the {room} light.",
        ),
    ),
    "send_message": (
        "Send a message to a person",
        {"to": "string", "text": "string"},
        (
            "Tell {to} that {text}.",
            "Send a message to {to}: {text}.",
            "Write to {to} that {text}.",
        ),
    ),
    "find_hotel": (
        "Find a hotel",
        {"city": "string", "nights": "integer"},
        (
            "Find a hotel in {city} for {nights} nights.",
            "I need a hotel in {city} for {nights} nights.",
            "Book {nights} nights in {city}.",
        ),
    ),
}
