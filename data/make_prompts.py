"""Writes the prompt files of this folder from a small grammar: `python -m data.make_prompts` (1 s).

    scenes.txt            4,000 general scenes, for preference rewards (PickScore, HPS, aesthetics)
    ocr.txt               2,000 prompts with one double-quoted text to render, for the OCR reward
    geneval_train.jsonl   3,000 lines in GenEval's metadata format (Ghosh et al. 2023, arXiv 2310.11513), with the task
                          weights of Flow-GRPO (arXiv 2505.05470): position 7, counting 5, color_attr 3, colors 1,
                          two_object 1, plus 40 single_object. It is drawn from the space the benchmark draws from, so
                          some of its prompts are the benchmark's own: `load(..., eval_source=...)` leaves those out
    edits.jsonl           400 edit instructions over the 16 drawings in edit_images/

Each file has its own seed, so that changing one grammar leaves the other files as they are.
"""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent


def a(phrase):
    """The phrase with its indefinite article."""
    vowel = phrase[0] in "aeiouAEIOU" and not phrase.startswith(("one-", "unicorn", "used", "uniform"))
    return f"{'an' if vowel else 'a'} {phrase}"


def collect(make, count, seed):
    """The first `count` distinct results of make(r) that are not None, in the order they came."""
    r, found = random.Random(seed), {}
    while len(found) < count:
        prompt = make(r)
        if prompt is not None:
            found[prompt] = None
    return list(found)


# ----------------------------------------------------------------------------------------------------------------------
# Scenes. A kind makes (subject, place); a subject reads well after "a photograph of" and, capitalised, as a sentence.

LIGHT_OUT = [
    "at sunrise", "at dusk", "in soft morning light", "under a full moon", "in the golden hour",
    "on an overcast afternoon",
    "just after the rain", "in thick fog", "under a stormy sky", "on a bright winter day", "in harsh midday sun",
    "in the blue light before dawn", "as the first snow falls", "in the rain", "under a starry sky",
    "on a hazy summer evening",
]  # fmt: skip
LIGHT_IN = [
    "by candlelight", "in the light of a tall window", "under a single hanging lamp", "in soft diffuse light",
    "with a warm glow from the fireplace", "in dim blue light", "with sunbeams full of dust",
    "under bright studio lights",
    "lit from the side against a dark background", "in pale morning light",
]  # fmt: skip
MEDIA = [
    "a photograph of", "a close-up photograph of", "a wide-angle photograph of", "a black-and-white photograph of",
    "a grainy film photograph of", "a long-exposure photograph of", "a watercolour of", "an oil painting of",
    "a charcoal drawing of", "a pencil sketch of", "a linocut print of", "a flat vector illustration of",
    "a children's book illustration of", "a detailed ink drawing of", "a pastel drawing of", "a paper-cut collage of",
    "a low-poly 3D render of", "a clay model of", "a pixel-art scene of", "a vintage travel poster of",
    "a woodblock print of",
    "a gouache painting of", "a stained-glass window showing", "an embroidered picture of", "a mosaic of",
    "a fresco of",
]  # fmt: skip
FINISH = [
    "with muted colours", "with vivid colours", "in a limited palette of blue and orange",
    "with a shallow depth of field",
    "with strong contrast", "full of fine detail", "in a calm and quiet mood", "with a playful mood",
    "with long shadows",
    "with visible brush strokes", "in earthy tones", "with plenty of empty space around it", "seen from above",
    "seen from a low angle", "in a symmetrical composition", "with soft edges", "in pale pastel tones",
    "in deep jewel tones",
]  # fmt: skip
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "turquoise"]

PEOPLE = [
    "young",
    "elderly",
    "middle-aged",
    "tall",
    "bearded",
    "smiling",
    "tired",
    "left-handed",
    "grey-haired",
    "cheerful",
]
WORK = {
    "baker": ["dusting loaves with flour", "pulling bread from a stone oven", "kneading a large ball of dough"],
    "carpenter": ["planing an oak board", "sanding a wooden chair", "measuring a plank with a folding rule"],
    "blacksmith": ["hammering a glowing iron bar", "quenching a blade in a barrel", "pumping the bellows"],
    "potter": ["shaping a bowl on the wheel", "glazing a row of cups", "opening a warm kiln"],
    "watchmaker": ["bending over an open pocket watch", "sorting tiny gears with tweezers"],
    "tailor": ["pinning the hem of a long coat", "cutting a pattern from grey wool"],
    "violin maker": ["carving the scroll of a new violin", "varnishing a violin by hand"],
    "bookbinder": ["sewing pages together", "pressing a leather cover in place"],
    "glassblower": ["turning molten glass on a long pipe", "shaping a blue vase with wet paper"],
    "scientist": ["looking into a microscope", "labelling a rack of test tubes", "writing equations on a glass wall"],
    "chef": ["tossing vegetables in a pan", "plating a small dessert", "slicing a fish with great care"],
    "painter": ["mixing colours on a palette", "stepping back from a large canvas"],
    "cobbler": ["stitching the sole of a boot", "polishing a pair of brown shoes"],
    "librarian": ["climbing a ladder between tall shelves", "stamping a pile of returned books"],
}
WORKPLACES = ["in a cluttered workshop", "in a narrow studio", "in a bright room with white walls",
              "in a vaulted cellar",
              "in a converted barn", "beside a large window", "at a heavy wooden bench",
              "in a small shop on a side street"]  # fmt: skip
OUTDOOR_WORK = {
    "farmer": ["leading two oxen", "mending a wooden fence", "carrying a crate of pumpkins"],
    "fisherman": ["untangling a green net", "rowing a narrow boat", "hauling in a crab pot"],
    "shepherd": ["counting sheep", "resting on a mossy rock with a dog at the feet"],
    "gardener": ["pruning a rose bush", "pushing a wheelbarrow full of leaves", "watering rows of lettuce"],
    "street musician": ["playing an accordion", "tuning an old guitar", "playing the cello"],
    "mountaineer": ["tightening a rope", "studying a folded map", "pouring tea from a flask"],
    "beekeeper": ["lifting a frame from a hive", "walking between rows of painted hives"],
    "postal worker": ["pushing a loaded bicycle", "sorting letters on a stone wall"],
}
OUTDOORS = ["on a windy hillside", "at the edge of a village", "by a slow river", "beside a stone bridge",
            "in a wide valley",
            "near a small harbour", "at the foot of a mountain", "in an old walled garden",
            "on a gravel path"]  # fmt: skip
ANIMALS = {
    "fox": ["curled up asleep", "leaping over a fallen log", "sniffing a mushroom"],
    "owl": ["perched on a signpost", "spreading its wings", "staring with wide eyes"],
    "hedgehog": ["peering out of a pile of leaves", "climbing over a root"],
    "otter": ["floating on its back", "cracking open a shell"],
    "elephant": ["spraying itself with dust", "walking beside its calf"],
    "tabby cat": ["stretching on a warm wall", "watching a butterfly", "balancing on a fence"],
    "sheepdog": ["shaking off water", "chasing a red ball", "waiting at a gate"],
    "heron": ["standing on one leg", "lifting off from shallow water"],
    "hare": ["sitting upright with its ears raised", "racing across the grass"],
    "badger": ["digging beside an oak", "trotting along a track"],
    "horse": ["galloping with its mane flying", "drinking from a trough"],
    "red squirrel": ["holding a hazelnut", "hanging upside down from a branch"],
    "tortoise": ["chewing a dandelion", "plodding past a row of pots"],
    "crow": ["carrying a shiny button", "landing on a scarecrow"],
    "bear": ["scratching its back on a pine", "fishing for salmon"],
    "parrot": ["ruffling bright feathers", "eating a slice of mango"],
}
WILD = ["in a birch forest", "on a pebble beach", "at the edge of a reed-lined pond", "in tall dry grass",
        "on a rocky slope",
        "in a snowy clearing", "in a field of poppies", "beside a mountain stream", "among ferns and moss",
        "in an orchard"]  # fmt: skip
LAND = ["terraced rice fields", "a chain of snow-covered peaks", "a winding river", "rolling sand dunes",
        "a field of lavender",
        "a frozen lake", "a waterfall dropping into a green pool", "basalt columns on a black beach",
        "a lone oak on a hill",
        "a narrow canyon of red rock", "a bamboo grove", "a salt flat like a mirror", "a fjord with steep dark walls",
        "vineyards on steep slopes", "a heath in purple bloom", "a chalk cliff above the sea",
        "a marsh crossed by a boardwalk"]  # fmt: skip
LAND_WITH = ["a small wooden cabin in the distance", "a flock of birds overhead", "a single path leading through",
             "a lighthouse on the horizon", "two hikers for scale", "mist in the hollows", "a row of cypress trees",
             "a stone chapel half hidden by trees", "wild goats on the rocks", "a rowing boat tied to a post",
             "clouds casting moving shadows", "a rainbow on one side", "smoke rising from a far chimney"]  # fmt: skip
STILL = ["pears", "a cracked porcelain jug", "a bunch of dried thistles", "an open notebook", "a brass telescope",
         "three lemons",
         "a half-peeled orange", "a string of pearls", "a stack of worn books", "a pewter plate",
         "a skull-shaped candle",
         "two seashells", "an hourglass", "a loaf of rye bread", "a wine bottle", "a pocket compass",
         "a vase of tulips",
         "an old key", "a folded linen cloth", "a pomegranate cut in half", "a pair of round glasses",
         "an inkwell"]  # fmt: skip
STILL_ON = ["on a scratched wooden table", "on a marble shelf", "on a dark velvet cloth", "on a window sill",
            "on a wicker chair",
            "on a crumpled white sheet", "on a stone ledge", "on an upturned crate"]  # fmt: skip
BUILDINGS = {
    "library": ["spiral staircases", "shelves up to the ceiling"],
    "railway station": ["a glass roof", "an iron clock"], "monastery": ["a shady cloister", "thick white walls"],
    "tea house": ["paper screens", "a curved roof"], "concert hall": ["curved wooden walls", "hanging glass panels"],
    "windmill": ["patched canvas sails", "a thatched cap"], "castle": ["ivy on the towers", "a drawbridge"],
    "greenhouse": ["rusty iron ribs", "giant ferns inside"],
    "tower block": ["balconies full of plants", "a painted facade"],
    "temple": ["carved stone columns", "a bronze bell"],
    "lighthouse": ["a red lantern room", "a winding outer stair"],
    "farmhouse": ["blue shutters", "a mossy slate roof"],
    "museum": ["a floating concrete roof", "a mirror pool in front"],
    "covered market": ["striped awnings", "tiled pillars"],
    "observatory": ["a half-open copper dome", "a narrow iron walkway"],
    "courtyard": ["a dry fountain", "orange trees"],
}  # fmt: skip
BUILDING_ADJ = [
    "abandoned",
    "modern",
    "medieval",
    "tiny",
    "grand",
    "half-ruined",
    "newly built",
    "round",
    "brick",
    "timber",
]
SITES = ["in the middle of a forest", "on a cliff by the sea", "in a crowded city", "at the end of a long avenue",
         "on an island",
         "between two mountains", "in a quiet suburb", "beside a canal", "in the desert",
         "on a hill above the town"]  # fmt: skip
DISHES = {
    "bowl of noodle soup": ["spring onions", "a soft egg"], "stack of pancakes": ["melting butter", "blueberries"],
    "vegetable curry": ["fresh coriander", "a wedge of lime"], "plum tart": ["powdered sugar", "a scoop of cream"],
    "plate of dumplings": ["sesame seeds", "a small dish of soy sauce"], "mushroom risotto": ["shaved cheese", "thyme"],
    "slice of chocolate cake": ["raspberries", "a dusting of cocoa"], "seafood paella": ["mussels", "lemon wedges"],
    "loaf of sourdough bread": ["a salted crust", "a pat of butter"], "tomato salad": ["basil leaves", "olive oil"],
    "grilled fish": ["charred lemon", "rosemary"], "wood-fired pizza": ["blistered edges", "fresh basil"],
    "bowl of porridge": ["sliced figs", "honey"], "cheese board": ["walnuts", "black grapes"],
    "fruit sorbet": ["mint leaves", "a thin wafer"], "bean stew": ["crusty bread", "a bay leaf"],
}  # fmt: skip
SERVED = ["on a rustic wooden table", "on a blue ceramic plate", "on a marble counter", "on a checked tablecloth",
          "in a busy street market", "on a picnic blanket", "on a tray by the window",
          "in a small family kitchen"]  # fmt: skip
VEHICLES = {
    "steam locomotive": ["crossing a stone viaduct", "waiting at a country station"],
    "delivery van": ["parked on a steep street", "stuck in deep mud"],
    "sailing ship": ["leaning into the wind", "lying at anchor"],
    "tram": ["turning a tight corner", "climbing a hill"],
    "bicycle": ["leaning against a wall", "loaded with flower baskets"],
    "motorcycle": ["racing along a coastal road", "standing outside a café"],
    "fire engine": ["rushing through a junction", "being washed by its crew"],
    "tractor": ["pulling a trailer of hay", "ploughing a long furrow"],
    "seaplane": ["skimming over a lake", "moored at a jetty"],
    "camper van": ["parked under tall pines", "driving towards the mountains"],
    "canal boat": ["gliding under a low bridge", "covered in potted herbs"],
    "cable car": ["rising through the clouds", "arriving at the summit"],
}
VEHICLE_ADJ = [
    "rusty",
    "brightly painted",
    "old-fashioned",
    "gleaming",
    "mud-splashed",
    "two-tone",
    "battered",
    "brand-new",
]
BEINGS = {
    "dragon": ["asleep on a heap of old books", "circling a ruined tower", "drinking from a mountain lake"],
    "clockwork giant": ["kneeling in a wheat field", "holding up a broken bridge"],
    "forest spirit": ["made of moss and antlers", "carrying a lantern of fireflies"],
    "wizard": ["brewing a glowing potion", "reading a book larger than a door"],
    "knight": ["riding a giant snail", "sharing bread with a goblin", "facing a wall of thorns"],
    "sea serpent": ["coiled around a lighthouse", "surfacing beside a fishing boat"],
    "robot": ["watering a bonsai", "learning to play the violin", "feeding pigeons"],
    "phoenix": ["rising from a campfire", "perched on a broken column"],
    "mermaid": ["repairing a sunken clock", "singing to a whale"],
    "griffin": ["guarding a nest of silver eggs", "landing on a castle wall"],
    "astronaut": ["planting a tree on a small moon", "crossing a field of glass flowers"],
    "unicorn": ["grazing in a walled garden", "crossing a bridge of light"],
}
BEING_ADJ = [
    "ancient",
    "tiny",
    "friendly",
    "weary",
    "translucent",
    "moss-covered",
    "silver",
    "lonely",
    "enormous",
    "curious",
]
REALMS = ["in a city built on floating islands", "in a library without an end", "in a forest of giant mushrooms",
          "beneath two moons", "in a valley of crystal spires", "at the gates of a sunken city",
          "on the back of a huge turtle",
          "in a desert of violet sand", "in a cave of glowing crystals", "above a sea of clouds"]  # fmt: skip
STREETS = ["a narrow street with hanging laundry", "a flower market", "a rooftop garden",
           "a crossing full of umbrellas",
           "a row of colourful houses", "an empty playground", "a fairground with a turning wheel", "a night market",
           "a quiet square with a fountain", "a stairway between old houses", "a harbour with stacked crates",
           "a chess game in a park", "a bus stop at the end of the line", "a bookshop with a green door"]  # fmt: skip
STREET_WITH = ["a cat on a doorstep", "a child with a balloon", "pigeons taking off", "a red bicycle", "paper lanterns",
               "two friends sharing a bench", "a dog on a long leash", "neon reflections on the ground",
               "falling leaves",
               "a newspaper blown by the wind", "a vendor selling roasted chestnuts",
               "a woman in a yellow coat"]  # fmt: skip
ROOMS = [
    "kitchen",
    "attic bedroom",
    "reading corner",
    "music room",
    "hallway",
    "bathroom",
    "painter's studio",
    "dining room",
]
ROOM_ADJ = ["cosy", "minimalist", "cluttered", "sunlit", "old-fashioned", "half-empty", "colourful", "rustic"]
ROOM_WITH = ["a round window", "a piano under a sheet", "plants on every shelf", "a sleeping dog on the rug",
             "patterned tiles",
             "a long table set for ten", "a rocking chair", "books piled on the floor", "a grandfather clock",
             "a hammock in the corner", "dried herbs hanging from the beams"]  # fmt: skip


def scene_subject(r):
    """-> (subject noun phrase, place or "", light)."""
    kind = r.choice(
        ["work", "work out", "animal", "land", "still", "building", "food", "vehicle", "fantasy", "street", "room"]
    )
    if kind == "work":
        who = r.choice(list(WORK))
        return f"{a(r.choice(PEOPLE))} {who} {r.choice(WORK[who])}", r.choice(WORKPLACES), r.choice(LIGHT_IN)
    if kind == "work out":
        who = r.choice(list(OUTDOOR_WORK))
        return f"{a(r.choice(PEOPLE))} {who} {r.choice(OUTDOOR_WORK[who])}", r.choice(OUTDOORS), r.choice(LIGHT_OUT)
    if kind == "animal":
        who = r.choice(list(ANIMALS))
        return f"{a(who)} {r.choice(ANIMALS[who])}", r.choice(WILD), r.choice(LIGHT_OUT)
    if kind == "land":
        return f"{r.choice(LAND)} with {r.choice(LAND_WITH)}", "", r.choice(LIGHT_OUT)
    if kind == "still":
        one, two, three = r.sample(STILL, 3)
        return f"{one}, {two} and {three}", r.choice(STILL_ON), r.choice(LIGHT_IN)
    if kind == "building":
        what = r.choice(list(BUILDINGS))
        return (
            f"{a(r.choice(BUILDING_ADJ))} {what} with {r.choice(BUILDINGS[what])}",
            r.choice(SITES),
            r.choice(LIGHT_OUT),
        )
    if kind == "food":
        what = r.choice(list(DISHES))
        one, two = DISHES[what] if r.random() < 0.5 else reversed(DISHES[what])
        dish = what if what in ("grilled fish", "seafood paella", "mushroom risotto", "fruit sorbet") else a(what)
        return f"{dish} with {one} and {two}", r.choice(SERVED), r.choice(LIGHT_IN)
    if kind == "vehicle":
        what = r.choice(list(VEHICLES))
        look = r.choice(
            [r.choice(VEHICLE_ADJ), r.choice(COLOURS), f"{r.choice(['small', 'large'])} {r.choice(COLOURS)}"]
        )
        return f"{a(look)} {what} {r.choice(VEHICLES[what])}", "", r.choice(LIGHT_OUT)
    if kind == "fantasy":
        who = r.choice(list(BEINGS))
        return f"{a(r.choice(BEING_ADJ))} {who} {r.choice(BEINGS[who])}", r.choice(REALMS), ""
    if kind == "street":
        return f"{r.choice(STREETS)} with {r.choice(STREET_WITH)}", "", r.choice(LIGHT_OUT)
    one, two = r.sample(ROOM_WITH, 2)
    return f"{a(r.choice(ROOM_ADJ))} {r.choice(ROOMS)} with {one} and {two}", "", r.choice(LIGHT_IN)


def scene(r):
    subject, place, light = scene_subject(r)
    medium, finish = r.choice(MEDIA), r.choice(FINISH)
    if "photograph" in medium and "brush" in finish:
        return None
    middle = " ".join(part for part in (subject, place) if part)
    template = r.choice(["medium", "medium light", "medium finish", "plain", "plain, medium", "light first"])
    if template == "medium":
        text = f"{medium} {middle}"
    elif template == "medium light":
        text = f"{medium} {middle} {light}"
    elif template == "medium finish":
        text = f"{medium} {middle}, {finish}"
    elif template == "plain":
        text = f"{middle} {light}, {finish}"
    elif template == "plain, medium":
        text = f"{middle} {light}, {medium.removesuffix(' of').removesuffix(' showing').split(' ', 1)[1]}"
    elif light and not light.startswith(("with", "lit")):
        text = f"{light}, {middle}, {finish}"
    else:
        return None
    text = " ".join(text.replace(" ,", ",").split()).strip(", ")
    return text[0].upper() + text[1:] if 8 <= len(text.split()) <= 30 else None


# ----------------------------------------------------------------------------------------------------------------------
# Texts to render

ADJ = ["Golden", "Silver", "Happy", "Hidden", "Little", "Old", "Blue", "Crooked", "Lucky", "Quiet", "Rusty", "Velvet",
       "Wild",
       "Royal", "Sleepy", "Northern", "Copper", "Midnight", "Sunny", "Secret", "Jolly", "Amber", "Humble",
       "Brave"]  # fmt: skip
NOUN = ["Fox", "Anchor", "Lantern", "Owl", "Maple", "River", "Garden", "Compass", "Pony", "Harbor", "Acorn",
        "Feather", "Moon",
        "Kettle", "Badger", "Orchid", "Pine", "Robin", "Star", "Whale", "Clover", "Falcon", "Willow",
        "Thistle"]  # fmt: skip
SHOPS = {"bakery": "Bakery", "bookshop": "Books", "café": "Coffee", "flower shop": "Flowers", "toy shop": "Toys",
         "barber shop": "Barber", "record store": "Records", "hardware store": "Tools", "restaurant": "Kitchen",
         "pharmacy": "Pharmacy", "pet shop": "Pets", "bicycle workshop": "Cycles", "inn": "Inn",
         "tea room": "Tea Room"}  # fmt: skip
MUG = ["World's Best Dad", "Monday Again", "But First Coffee", "Hello Sunshine", "Do Not Disturb", "Home Sweet Home",
       "Stay Curious",
       "Tea Time", "Born to Paint", "Never Give Up", "Dream Big", "Be Kind", "Good Morning", "One More Chapter",
       "Keep Going",
       "Cat Person", "Plan B", "Slow Down", "Ask Me Tomorrow", "Made With Love", "Night Owl", "Weekend Mode",
       "Just Breathe"]  # fmt: skip
NOTICE = ["No Parking", "Wet Floor", "Exit Only", "Keep Right", "Mind the Gap", "Beware of the Dog", "Fresh Paint",
          "Out of Order",
          "Private Property", "No Swimming", "Quiet Please", "Staff Only", "Road Closed", "Slippery When Wet",
          "Wash Your Hands",
          "Do Not Feed Birds", "Ring the Bell", "Bridge Out Ahead", "Please Wait Here",
          "Back in Five Minutes"]  # fmt: skip
SALE = ["Grand Opening", "Summer Sale", "Half Price Today", "Buy One Get One", "Free Samples", "Last Chance",
        "Open All Night",
        "New Arrivals", "Live Music Tonight", "Farmers Market", "Harvest Festival", "Fresh Eggs", "Hot Soup",
        "Ice Cold Lemonade",
        "Pick Your Own Apples", "Everything Must Go", "Happy Birthday", "Welcome Home", "Congratulations",
        "Good Luck"]  # fmt: skip
TITLE = ["The {0} {1}", "A {1} in Winter", "Song of the {1}", "Beyond the {1}", "The Last {1}", "{0} {1} Rising",
         "My {0} {1}",
         "Return of the {1}", "Letters to a {1}", "The {1} Thief", "{0} Days", "The {1} and the {0}"]  # fmt: skip
PLACES = ["Oakville", "Riverton", "Pine Ridge", "Maple Street", "Harbor Road", "Station Square", "Mill Lane",
          "Stone Bridge",
          "Lakeside", "Hilltop", "North Pier", "Old Town", "Elm Avenue", "Market Hall", "Castle Hill",
          "Fern Valley"]  # fmt: skip
LETTERING = [
    "hand-painted",
    "glowing neon",
    "carved wooden",
    "faded",
    "bold red",
    "elegant gold",
    "chalk",
    "rusty metal",
    "enamel",
]
AROUND = [
    "",
    "",
    " at night",
    " in the rain",
    " in bright sunlight",
    " on a snowy morning",
    " at sunset",
    " on a foggy morning",
]
VIEW = [
    "a photo of",
    "a close-up of",
    "a cinematic shot of",
    "an illustration of",
    "a watercolour of",
    "a realistic picture of",
]


def ocr_prompt(r):
    adj, noun, place, view, around = (r.choice(words) for words in (ADJ, NOUN, PLACES, VIEW, AROUND))
    inside = r.choice(["", " on a cluttered desk", " on a kitchen table", " by a window", " on a wooden shelf"])
    colour, lettering = r.choice(COLOURS), r.choice(LETTERING)
    kind = r.choice(["shop", "shop", "mug", "notice", "banner", "billboard", "book", "station", "shirt", "street",
                     "boat", "label",
                     "poster", "note", "cake", "number", "screen", "stone", "robot"])  # fmt: skip
    if kind == "shop":
        shop = r.choice(list(SHOPS))
        name = f"{adj} {noun} {SHOPS[shop]}" if r.random() < 0.6 else f"The {adj} {noun}"
        form = r.choice(
            ["{v} {s} with {l} sign that reads {t}{w}", "{v} the front of {s} with {t} on {l} sign above the door{w}"]
        )
        return quoted(form, name, v=view, s=a(shop), l=a(lettering), w=around)
    if kind == "mug":
        text = r.choice(MUG + [f"{adj} {noun}"])
        return quoted("{v} {c} mug with the words {t} printed on it{w}", text, v=view, c=a(colour), w=inside)
    if kind == "notice":
        where = r.choice(["on a brick wall", "beside a country road", "on a wooden fence", "next to a glass door",
                          "in a park",
                          "at the edge of a lake", "in a long corridor", "on a factory gate"])  # fmt: skip
        return quoted("{v} {l} sign {p} that says {t}", r.choice(NOTICE), v=view, l=a(lettering), p=where)
    if kind == "banner":
        where = r.choice(
            ["across a village street", "over a shop entrance", "between two trees", "above a stage", "on a balcony"]
        )
        return quoted(
            "{v} {c} banner hanging {p} with {t} in large letters{w}",
            r.choice(SALE),
            v=view,
            c=a(colour),
            p=where,
            w=around,
        )
    if kind == "billboard":
        text = r.choice(SALE + [f"Visit {place}", f"{noun} Soda", f"{adj} {noun} Tours"])
        where = r.choice(
            ["beside a desert highway", "above a busy square", "on top of a tall building", "at a railway station"]
        )
        return quoted("{v} a huge billboard {p} showing the text {t}{w}", text, v=view, p=where, w=around)
    if kind in ("book", "poster"):
        text = r.choice(TITLE).format(adj, noun)
        if kind == "book":
            return quoted("{v} {c} book with the title {t} on its cover{w}", text, v=view, c=a(colour), w=inside)
        what = r.choice(["film", "theatre", "concert", "circus", "puppet show"])
        return quoted("a vintage {k} poster in {c} tones with the title {t} at the top", text, k=what, c=colour)
    if kind == "station":
        text = r.choice(
            [place, f"{place} Central", f"Platform {r.randint(1, 24)}", f"{place} Express", f"Gate {r.randint(1, 60)}"]
        )
        return quoted("{v} an old station with a sign above the tracks reading {t}{w}", text, v=view, w=around)
    if kind == "shirt":
        who = r.choice(["a young man", "an elderly woman", "a teddy bear", "a child", "a dancer", "a smiling farmer"])
        return quoted(
            "{v} {p} wearing {c} shirt with {t} written across the front", r.choice(MUG), v=view, p=who, c=a(colour)
        )
    if kind == "street":
        text = r.choice(
            [place, f"{noun} Street", f"{noun} Lane", f"{adj} {noun} Road", f"{place} {r.randint(2, 90)} km"]
        )
        return quoted("{v} a road sign at a quiet crossing that reads {t}{w}", text, v=view, w=around)
    if kind == "boat":
        text = r.choice([f"{adj} {noun}", f"Queen of {place}", f"Sea {noun}"])
        return quoted(
            "{v} {c} fishing boat with the name {t} painted on its bow{w}", text, v=view, c=a(colour), w=around
        )
    if kind == "label":
        what = r.choice(
            ["jar of honey", "bottle of olive oil", "tin of biscuits", "box of tea", "jar of pickles", "bottle of ink"]
        )
        text = r.choice([f"{adj} {noun}", f"{place} Farm", f"{noun} & Sons", f"{adj} {noun} No. {r.randint(1, 9)}"])
        return quoted("{v} a {k} whose label says {t}{w}", text, v=view, k=what, w=inside)
    if kind == "note":
        text = r.choice(["Call Grandma", "Buy Milk", "Feed the Cat", "Back Soon", "I Love You", "Meet Me at Noon",
                         "Water the Plants",
                         "Do Not Open", "Thank You", f"Lunch With {noun}",
                         f"Train at {r.randint(1, 12)}:{r.randint(10, 59)}"])  # fmt: skip
        where = r.choice(["a fridge door", "a cork board", "a bathroom mirror", "a laptop", "an old wooden door"])
        return quoted("{v} {c} paper note on {p} with the handwritten words {t}", text, v=view, c=a(colour), p=where)
    if kind == "cake":
        text = r.choice(["Happy Birthday",
                         f"Happy {r.choice([4, 5, 6, 7, 8, 9, 10, 18, 30, 40, 50, 60, 75, 80])}th Birthday",
                         "Just Married", "Well Done", "Sweet Sixteen",
                         f"Goodbye {place}", f"Team {noun}", "Get Well Soon"])  # fmt: skip
        icing = r.choice(COLOURS)
        return quoted("{v} a round cake with {t} written in {c} icing{w}", text, v=view, c=icing, w=inside)
    if kind == "number":
        text = r.choice(
            [
                f"{r.randint(100, 9999)}",
                f"No. {r.randint(10, 999)}",
                f"Bus {r.randint(10, 399)}",
                f"Taxi {r.randint(100, 999)}",
            ]
        )
        what = r.choice(
            [
                "tram",
                "blue front door",
                "racing car",
                "mailbox",
                "locomotive",
                "hotel door",
                "yellow bus",
                "runner's vest",
            ]
        )
        return quoted("{v} a {k} with {t} in large characters{w}", text, v=view, k=what, w=around)
    if kind == "screen":
        text = r.choice(["Game Over", "Level Complete", "System Ready", "Loading", "Hello World", "Connection Lost",
                         "Press Start",
                         f"Score {r.randint(100, 9999)}", f"Player {r.randint(1, 4)} Wins",
                         f"Welcome to {place}"])  # fmt: skip
        what = r.choice(
            ["an old computer monitor", "an arcade machine", "a handheld console", "a giant stadium display"]
        )
        return quoted("{v} {k} showing the message {t} in {c} letters", text, v=view, k=what, c=colour)
    if kind == "stone":
        what = r.choice(["stone tablet", "wooden bench", "bronze plaque", "tree trunk", "castle gate", "sundial"])
        text = r.choice(
            [
                f"{adj} {noun}",
                f"{place} {r.randint(1600, 1990)}",
                "Time Flies",
                "Know Thyself",
                "Rest a While",
                "Here Be Dragons",
            ]
        )
        return quoted("{v} a weathered {k} with {t} carved into it{w}", text, v=view, k=what, w=around)
    who = r.choice(
        ["a friendly robot", "a penguin", "a wizard", "an astronaut", "a fox in a raincoat", "a tired dragon"]
    )
    what = r.choice(["cardboard sign", "flag", "balloon", "chalkboard", "scroll"])
    text = r.choice(MUG + SALE + [f"I Love {place}", f"Vote for {noun}", f"{place} or Bust"])
    return quoted("{v} {p} holding a {k} that says {t}{w}", text, v=view, p=who, k=what, w=around)


def quoted(form, text, **words):
    if not (3 <= len(text) <= 29 and len(text.split()) <= 5):
        return None
    prompt = form.format(t=f'"{text}"', **words)
    return prompt[0].upper() + prompt[1:]


# ----------------------------------------------------------------------------------------------------------------------
# GenEval

CLASSES = """
    person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter
    bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis
    snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup
    fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch
    potted_plant bed dining_table toilet tv laptop computer_mouse tv_remote computer_keyboard cell_phone microwave
    oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush
""".split()
CLASSES = [name.replace("_", " ") for name in CLASSES]  # COCO's order, with GenEval's three renames
GENEVAL_COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
RELATIONS = ["left of", "right of", "above", "below"]
NUMBERS = {2: "two", 3: "three", 4: "four"}
IRREGULAR = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}
PAIRS = (
    "skis",
    "scissors",
)  # no singular; "two skis" is a pair to one detector and two objects to another: not counted
BARE = ["", " in a row", " on a plain background", " in bright daylight"]


def one_of(name, colour=None):
    """ "a red apple", "an apple", "a pair of red skis"."""
    look = f"{colour} {name}" if colour else name
    if name in PAIRS:
        return f"a pair of {look}"
    return f"a head of {look}" if name == "broccoli" else a(look)


def plural(name):
    if name == "broccoli":
        return "heads of broccoli"
    if name in IRREGULAR:
        return IRREGULAR[name]
    return name + ("es" if name.endswith(("s", "sh", "ch", "x")) else "s")


def geneval():
    """3,000 metadata dicts with distinct prompts."""
    r = random.Random("geneval")
    things = [name for name in CLASSES if name != "person"]  # a purple person is not what anyone means

    def line(tag, include, prompt, **extra):
        return json.dumps({"tag": tag, "include": include, **extra, "prompt": f"a photo of {prompt}"})

    def single_object(r):
        name = r.choice(CLASSES)
        return line("single_object", [{"class": name, "count": 1}], one_of(name))

    def two_object(r):
        x, y = r.sample(CLASSES, 2)
        return line("two_object", [{"class": x, "count": 1}, {"class": y, "count": 1}], f"{one_of(x)} and {one_of(y)}")

    def colors(r):
        name, colour = r.choice(things), r.choice(GENEVAL_COLOURS)
        return line("colors", [{"class": name, "count": 1, "color": colour}], one_of(name, colour))

    def color_attr(r):
        (x, y), (cx, cy) = r.sample(things, 2), r.sample(GENEVAL_COLOURS, 2)
        include = [{"class": x, "count": 1, "color": cx}, {"class": y, "count": 1, "color": cy}]
        return line("color_attr", include, f"{one_of(x, cx)} and {one_of(y, cy)}")

    def counting(r):
        name, count = r.choice([name for name in CLASSES if name not in PAIRS]), r.choice(list(NUMBERS))
        include, exclude = [{"class": name, "count": count}], [{"class": name, "count": count + 1}]
        return line("counting", include, f"{NUMBERS[count]} {plural(name)}{r.choice(BARE)}", exclude=exclude)

    def position(r):  # the second object stands in `relation` to the first, index 0
        (x, y), relation = r.sample(CLASSES, 2), r.choice(RELATIONS)
        include = [{"class": x, "count": 1}, {"class": y, "count": 1, "position": [relation, 0]}]
        return line("position", include, f"{one_of(y)} {relation} {one_of(x)}")

    counts = {position: 1219, counting: 871, color_attr: 522, colors: 174, two_object: 174, single_object: 40}
    lines = [text for make, count in counts.items() for text in collect(make, count, make.__name__)]
    r.shuffle(lines)
    return [json.loads(text) for text in lines]


# ----------------------------------------------------------------------------------------------------------------------
# Edits. Pictures are drawn in units of a 512 x 512 canvas at twice the size, then reduced: smooth edges.


class Pen:
    def __init__(self, top, bottom=None, horizon=512):
        """A background that fades from `top` to `bottom` (RGB) down to `horizon`."""
        self.image = Image.new("RGB", (1024, 1024), top)
        self.draw = ImageDraw.Draw(self.image)
        for y in range(0, horizon, 32) if bottom else ():
            t = y / max(horizon - 32, 1)
            self.box(0, y, 512, y + 32, tuple(round(p + t * (q - p)) for p, q in zip(top, bottom)))

    def box(self, x0, y0, x1, y1, fill, radius=0):
        self.draw.rounded_rectangle([2 * x0, 2 * y0, 2 * x1 - 1, 2 * y1 - 1], 2 * radius, fill=fill)

    def disc(self, x, y, rx, fill, ry=None):
        ry = rx if ry is None else ry
        self.draw.ellipse([2 * (x - rx), 2 * (y - ry), 2 * (x + rx), 2 * (y + ry)], fill=fill)

    def poly(self, fill, *xy):
        self.draw.polygon([2 * value for value in xy], fill=fill)

    def line(self, fill, width, *xy):
        self.draw.line([2 * value for value in xy], fill=fill, width=2 * width, joint="curve")
        for x, y in ((xy[0], xy[1]), (xy[-2], xy[-1])):
            self.disc(x, y, width / 2 - 0.5, fill)

    def arc(self, x, y, r, start, end, fill, width):
        self.draw.arc([2 * (x - r), 2 * (y - r), 2 * (x + r), 2 * (y + r)], start, end, fill=fill, width=2 * width)

    def cloud(self, x, y, s=1.0):
        for dx, dy, r in ((-30, 4, 20), (0, -8, 28), (30, 4, 20)):
            self.disc(x + s * dx, y + s * dy, s * r, WHITE)
        self.box(x - 34 * s, y + 2 * s, x + 34 * s, y + 24 * s, WHITE, 10 * s)

    def pine(self, x, y, s=1.0, green=(38, 104, 72)):
        self.box(x - 7 * s, y - 20 * s, x + 7 * s, y, BROWN)
        for k, half in enumerate((48, 38, 27)):
            base = y - 18 * s - 34 * s * k
            self.poly(green, x - half * s, base, x + half * s, base, x, base - 62 * s)

    def tree(self, x, y, s=1.0):
        self.box(x - 11 * s, y - 80 * s, x + 11 * s, y, BROWN)
        for dx, dy, r in ((-30, -100, 38), (30, -100, 38), (0, -134, 46)):
            self.disc(x + dx * s, y + dy * s, r * s, (64, 148, 74))


SKY, PALE, WHITE, INK = (116, 186, 236), (214, 236, 250), (252, 252, 250), (44, 48, 60)
RED, GREEN, BLUE, YELLOW, ORANGE = (208, 54, 52), (104, 176, 86), (58, 104, 190), (248, 208, 66), (240, 140, 48)
BROWN, WALL, WOOD, SAND, PINK = (120, 80, 52), (240, 228, 206), (176, 120, 74), (236, 210, 150), (238, 130, 166)


def draw_house():
    p = Pen(SKY, PALE, 352)
    p.box(0, 340, 512, 512, GREEN)
    p.disc(420, 90, 48, YELLOW)
    p.cloud(120, 90)
    p.box(330, 130, 0 + 362, 210, (150, 84, 70))  # the chimney, behind the roof
    p.box(150, 220, 390, 400, WALL)
    p.poly(RED, 124, 224, 416, 224, 270, 112)
    p.box(244, 300, 298, 400, BROWN, 4)
    p.disc(288, 352, 4, YELLOW)
    for x in (176, 320):
        p.box(x, 262, x + 48, 310, BLUE, 3)
        p.box(x + 22, 262, x + 26, 310, WALL)
        p.box(x, 284, x + 48, 288, WALL)
    p.poly((222, 200, 160), 244, 400, 298, 400, 340, 512, 200, 512)
    p.tree(70, 400)
    return p.image


def draw_fruit():
    p = Pen((246, 236, 216))
    p.box(0, 300, 512, 512, WOOD)
    for y in (348, 402, 462):
        p.box(0, y, 512, y + 3, (156, 102, 60))
    p.disc(256, 438, 190, (150, 98, 58), 26)
    p.disc(150, 372, 58, RED, 54)
    p.line(BROWN, 7, 150, 324, 158, 296)
    p.poly(GREEN, 158, 306, 196, 288, 190, 312)
    p.disc(132, 352, 12, (236, 120, 110), 16)
    p.poly(YELLOW, 222, 330, 236, 322, 262, 372, 318, 396, 368, 384, 374, 398, 330, 432, 272, 426, 234, 390)
    p.poly(BROWN, 222, 330, 236, 322, 232, 312, 220, 318)
    p.line((222, 176, 40), 4, 240, 352, 262, 394, 312, 414, 356, 404)
    p.disc(430, 360, 66, (40, 76, 150), 20)
    p.poly(BLUE, 364, 362, 496, 362, 466, 432, 394, 432)
    p.disc(430, 432, 36, BLUE, 10)
    return p.image


def draw_boat():
    p = Pen((118, 190, 240), (232, 242, 248), 288)
    p.disc(96, 96, 46, YELLOW)
    p.cloud(380, 90, 1.1)
    p.box(0, 288, 512, 512, (52, 128, 190))
    for k, y in enumerate(range(316, 512, 34)):
        for x in range(-40 + 46 * (k % 2), 512, 92):
            p.arc(x, y, 20, 20, 160, (110, 176, 222), 4)
    p.box(262, 96, 270, 336, BROWN)
    p.poly(WHITE, 274, 104, 274, 318, 400, 318)
    p.poly((230, 232, 236), 256, 130, 256, 318, 164, 318)
    p.poly(RED, 130, 330, 408, 330, 364, 396, 176, 396)
    p.box(130, 330, 408, 342, (160, 36, 38))
    return p.image


def draw_lake():
    p = Pen((150, 196, 232), (240, 232, 224), 320)
    for x, y, half in ((110, 110, 170), (400, 130, 160), (256, 70, 190)):
        p.poly((112, 122, 150), x - half, 320, x + half, 320, x, y)
        w = half * 70 / (320 - y)
        p.poly(WHITE, x - w, y + 70, x - w / 3, y + 52, x, y + 76, x + w / 3, y + 52, x + w, y + 70, x, y)
    p.box(0, 316, 512, 512, (70, 140, 176))
    for x, y, w in ((60, 356, 120), (300, 380, 150), (130, 420, 110), (340, 450, 120)):
        p.box(x, y, x + w, y + 4, (140, 192, 214), 2)
    p.poly((96, 150, 84), 0, 512, 0, 430, 150, 470, 230, 512)
    p.pine(60, 476, 1.5)
    p.poly((96, 150, 84), 512, 512, 512, 440, 400, 512)
    p.pine(470, 500, 1.2)
    return p.image


def draw_vase():
    p = Pen((196, 220, 214))
    p.box(0, 384, 512, 512, (228, 206, 176))
    p.box(0, 384, 512, 392, (200, 172, 138))
    for x, y, colour in ((176, 130, RED), (256, 90, YELLOW), (340, 136, PINK)):
        p.line((70, 136, 70), 7, 256, 290, (x + 256) / 2, 210, x, y)
        for dx, dy in ((0, -26), (25, -8), (16, 21), (-16, 21), (-25, -8)):
            p.disc(x + dx, y + dy, 20, colour)
        p.disc(x, y, 15, (120, 72, 40) if colour == YELLOW else YELLOW)
    for x0, x1 in ((196, 236), (316, 276)):
        p.poly((84, 156, 84), x0 - 8, 214, x1, 240, 256, 276, x0, 240)
    p.disc(256, 426, 100, (200, 176, 146), 16)
    p.poly(BLUE, 214, 262, 298, 262, 290, 296, 326, 350, 310, 420, 202, 420, 186, 350, 222, 296)
    p.box(190, 338, 322, 356, WHITE)
    p.disc(256, 262, 42, (40, 76, 150), 9)
    return p.image


def draw_cat():
    p = Pen((240, 222, 196))
    p.box(0, 410, 512, 512, (166, 120, 84))
    p.box(196, 40, 316, 150, BROWN, 4)
    p.box(206, 50, 306, 140, (170, 212, 236))
    p.poly((98, 150, 96), 206, 140, 250, 90, 276, 118, 290, 104, 306, 140)
    p.box(50, 200, 462, 400, (52, 96, 172), 30)
    p.box(24, 260, 100, 430, BLUE, 26)
    p.box(412, 260, 488, 430, BLUE, 26)
    p.box(90, 320, 422, 420, (74, 124, 206), 18)
    for x in (60, 430):
        p.box(x, 426, x + 22, 458, INK)
    p.line(ORANGE, 20, 330, 316, 376, 300, 384, 256)
    p.disc(270, 296, 78, ORANGE, 44)
    p.disc(196, 250, 46, ORANGE, 42)
    p.poly(ORANGE, 154, 236, 160, 186, 194, 214)
    p.poly(ORANGE, 238, 236, 232, 186, 198, 214)
    for x in (180, 212):
        p.disc(x, 246, 7, INK, 9)
    p.poly(PINK, 190, 262, 202, 262, 196, 270)
    for dy in (-4, 6):
        p.line(WHITE, 2, 176, 268, 140, 268 + 2 * dy)
        p.line(WHITE, 2, 216, 268, 252, 268 + 2 * dy)
    for x in (280, 304):
        p.line((204, 106, 30), 8, x, 262, x + 6, 286)
    p.box(186, 318, 240, 336, (250, 170, 90), 9)
    return p.image


def draw_car():
    p = Pen(SKY, PALE, 300)
    p.disc(90, 90, 42, YELLOW)
    p.cloud(350, 84, 1.2)
    p.disc(110, 380, 220, (120, 184, 96), 130)
    p.disc(420, 390, 240, (94, 164, 84), 130)
    p.box(0, 372, 512, 512, (88, 90, 98))
    p.box(0, 372, 512, 380, (190, 190, 190))
    for x in range(10, 512, 110):
        p.box(x, 468, x + 62, 478, WHITE)
    p.tree(440, 374, 0.9)
    p.poly(RED, 150, 320, 194, 256, 322, 256, 366, 320)
    p.box(96, 314, 418, 392, RED, 24)
    p.poly(PALE, 172, 318, 204, 270, 252, 270, 252, 318)
    p.poly(PALE, 264, 318, 264, 270, 314, 270, 344, 318)
    p.disc(408, 344, 10, YELLOW)
    p.box(272, 334, 300, 340, (150, 30, 34), 3)
    for x in (170, 342):
        p.disc(x, 392, 38, INK)
        p.disc(x, 392, 18, (200, 204, 210))
    return p.image


def draw_balloon():
    p = Pen((130, 196, 240), (236, 244, 250), 384)
    p.cloud(86, 150)
    p.cloud(420, 230, 1.1)
    p.box(0, 420, 512, 512, (150, 190, 90))
    p.disc(120, 470, 260, (150, 190, 90), 100)
    p.disc(420, 490, 280, (112, 170, 84), 110)
    for x in (330, 362, 394, 426, 458):
        p.line((86, 140, 66), 6, x, 420 + abs(x - 394) / 4, x - 40, 512)
    p.disc(256, 160, 116, RED, 120)
    p.disc(256, 160, 74, YELLOW, 120)
    p.disc(256, 160, 28, RED, 120)
    p.poly(RED, 164, 232, 348, 232, 276, 304, 236, 304)
    p.poly(YELLOW, 208, 252, 304, 252, 268, 304, 244, 304)
    for x in (236, 276):
        p.line(BROWN, 3, x, 302, 244 if x < 256 else 268, 342)
    p.box(230, 338, 282, 378, WOOD, 6)
    p.box(230, 338, 282, 348, BROWN, 4)
    return p.image


def draw_lighthouse():
    p = Pen((140, 190, 226), (244, 226, 206), 330)
    p.cloud(110, 110)
    p.box(0, 330, 512, 512, (48, 112, 164))
    for y, x in ((356, 40), (384, 410), (420, 60), (456, 380), (484, 150)):
        p.box(x, y, x + 74, y + 5, (120, 174, 208), 2)
    p.poly((96, 92, 96), 130, 440, 180, 376, 240, 356, 330, 366, 400, 440)
    p.poly((122, 118, 120), 180, 440, 220, 384, 300, 372, 340, 440)
    for k in range(6):
        y, half = 140 + 38 * k, 30 + 3.5 * k
        p.poly(RED if k % 2 else WHITE, 266 - half, y, 266 + half, y, 269.5 + half, y + 38, 262.5 - half, y + 38)
    p.box(222, 130, 310, 142, INK, 3)
    p.box(244, 92, 288, 130, YELLOW)
    for x in (242, 263, 284):
        p.box(x, 92, x + 6, 130, INK)
    p.poly(RED, 232, 94, 300, 94, 266, 58)
    p.box(254, 322, 280, 368, BROWN, 12)
    return p.image


def draw_desk():
    p = Pen((206, 220, 232))
    p.box(0, 340, 512, 512, WOOD)
    p.box(0, 340, 512, 350, (150, 100, 60))
    p.poly((170, 172, 176), 92, 380, 140, 380, 128, 372, 104, 372)  # the lamp: foot, arm, shade
    p.disc(112, 382, 52, INK, 12)
    p.line(INK, 8, 112, 380, 80, 240, 150, 150)
    p.poly((60, 140, 110), 120, 146, 160, 106, 220, 166, 140, 206)
    p.disc(184, 190, 20, YELLOW)
    p.box(210, 400, 372, 424, RED, 4)
    p.box(216, 404, 372, 420, WHITE)
    p.box(196, 374, 358, 400, (52, 96, 172), 4)
    p.box(202, 378, 358, 396, WHITE)
    p.disc(448, 350, 36, WHITE)
    p.disc(448, 350, 20, WOOD)
    p.box(448 - 60, 342, 436, 352, (206, 220, 232))
    p.box(376, 300, 448, 396, WHITE, 10)
    p.disc(412, 304, 36, (226, 226, 226), 9)
    p.disc(412, 304, 29, (92, 58, 40), 6)
    for x in (398, 424):
        p.line((236, 242, 246), 5, x, 288, x + 8, 268, x - 4, 248, x + 4, 226)
    return p.image


def draw_snowman():
    p = Pen((150, 186, 220), (226, 236, 246), 360)
    p.disc(120, 470, 320, (244, 248, 252), 120)
    p.disc(430, 480, 300, WHITE, 116)
    p.pine(76, 412, 1.5)
    p.pine(440, 410, 1.2)
    for x, y in (
        (30, 60),
        (150, 100),
        (210, 40),
        (330, 70),
        (400, 130),
        (470, 50),
        (360, 210),
        (150, 230),
        (500, 190),
        (16, 190),
    ):
        p.disc(x, y, 5, WHITE)
    shade = (226, 234, 244)
    p.disc(256, 408, 82, shade)
    p.disc(252, 404, 78, WHITE)
    p.disc(256, 292, 60, shade)
    p.disc(253, 289, 57, WHITE)
    p.disc(256, 204, 44, shade)
    p.disc(254, 202, 42, WHITE)
    p.line(BROWN, 7, 204, 284, 140, 244)
    p.line(BROWN, 7, 308, 284, 372, 244)
    p.box(206, 240, 306, 262, RED, 10)
    p.box(276, 250, 300, 318, RED, 6)
    p.box(206, 158, 306, 170, INK, 4)
    p.box(224, 100, 288, 164, INK, 4)
    for x in (240, 272):
        p.disc(x, 196, 5, INK)
    p.poly(ORANGE, 256, 206, 256, 220, 304, 218)
    for y in (284, 312, 380):
        p.disc(256, y, 6, INK)
    return p.image


def draw_city():
    p = Pen((132, 190, 236), (238, 240, 240), 416)
    p.cloud(90, 70)
    p.cloud(420, 96, 0.9)
    for x0, x1, top, colour, windows in (
        (30, 150, 190, (196, 96, 76), (250, 222, 150)),
        (176, 322, 90, (110, 130, 160), (206, 230, 244)),
        (350, 484, 230, (226, 186, 110), (120, 80, 60)),
    ):
        p.box(x0, top, x1, 424, colour)
        p.box(x0 - 6, top - 8, x1 + 6, top + 6, tuple(c - 30 for c in colour), 2)
        for y in range(top + 26, 350, 48):
            for x in range(x0 + 16, x1 - 24, 38):
                p.box(x, y, x + 22, y + 28, windows, 2)
        middle = (x0 + x1) // 2
        p.box(middle - 16, 376, middle + 16, 424, INK, 3)
    p.box(0, 420, 512, 440, (190, 190, 188))
    p.box(0, 440, 512, 512, (90, 92, 100))
    for x in range(20, 512, 100):
        p.box(x, 472, x + 56, 480, WHITE)
    return p.image


def draw_desert():
    p = Pen((250, 190, 120), (254, 232, 190), 352)
    p.disc(390, 120, 54, (254, 240, 170))
    p.poly((200, 120, 84), 0, 340, 40, 230, 130, 230, 170, 340)
    p.disc(110, 470, 300, SAND, 160)
    p.disc(430, 500, 320, (226, 192, 126), 160)
    cactus = (66, 140, 84)
    p.disc(262, 444, 86, (206, 170, 106), 12)
    p.line(cactus, 34, 180, 250, 180, 306, 250, 306)
    p.line(cactus, 34, 336, 216, 336, 280, 270, 280)
    p.box(232, 150, 288, 444, cactus, 28)
    for x in (248, 260, 272):
        p.box(x - 1, 176, x + 2, 430, (48, 112, 66))
    p.disc(260, 150, 12, PINK)
    for x, y, s in ((110, 450, 1.0), (420, 430, 0.8)):
        p.disc(x, y, 34 * s, (150, 116, 92), 20 * s)
        p.disc(x - 6, y - 4, 20 * s, (172, 136, 108), 11 * s)
    return p.image


def draw_fishbowl():
    p = Pen((230, 214, 232))
    p.box(0, 400, 512, 512, (150, 102, 70))
    p.box(0, 400, 512, 410, (124, 80, 52))
    p.disc(256, 430, 140, (126, 84, 56), 18)
    p.disc(256, 270, 172, (236, 244, 250), 164)
    p.disc(256, 272, 162, (124, 194, 226), 154)
    p.box(90, 100, 422, 194, (230, 214, 232))
    p.disc(256, 194, 144, (236, 244, 250), 22)
    p.disc(256, 200, 136, (156, 212, 236), 18)
    p.disc(256, 402, 88, (228, 200, 140), 26)
    for x, tilt in ((166, -10), (182, 12), (340, 10)):
        p.line((64, 150, 90), 9, x + 12, 392, x + tilt, 350, x + 10, 310, x - tilt, 270)
    p.poly(ORANGE, 300, 290, 362, 252, 348, 292, 362, 332)
    p.poly((226, 112, 30), 240, 258, 276, 226, 290, 262)
    p.disc(252, 290, 62, ORANGE, 40)
    p.disc(214, 280, 10, WHITE)
    p.disc(212, 280, 5, INK)
    p.line(WHITE, 7, 252, 256, 258, 290, 252, 324)
    for x, y, r in ((166, 250, 7), (156, 226, 5), (172, 214, 4)):
        p.disc(x, y, r, (220, 240, 248))
    return p.image


def draw_cake():
    p = Pen((250, 222, 226))
    p.box(0, 404, 512, 512, (156, 196, 200))
    p.box(0, 404, 512, 412, (128, 168, 174))
    p.disc(256, 440, 196, WHITE, 30)
    p.disc(256, 434, 172, (232, 232, 232), 22)
    p.disc(256, 416, 140, (110, 66, 44), 26)
    p.box(116, 276, 396, 418, (134, 84, 56))
    p.box(116, 338, 396, 354, (250, 236, 210))
    p.disc(256, 276, 140, PINK, 28)
    for x, drop in ((132, 40), (170, 58), (208, 38), (248, 62), (288, 42), (328, 60), (366, 44)):
        p.box(x - 17, 276, x + 21, 276 + drop, PINK, 16)
    for x, y in ((170, 274), (222, 288), (290, 286), (350, 276)):
        p.disc(x, y, 14, RED, 12)
    for x, colour in ((196, BLUE), (256, GREEN), (316, BLUE)):
        p.box(x - 7, 196, x + 7, 270, colour, 3)
        p.line(INK, 2, x, 186, x, 196)
        p.disc(x, 172, 9, ORANGE, 16)
        p.disc(x, 176, 5, YELLOW, 10)
    return p.image


def draw_beach():
    p = Pen((120, 196, 242), (220, 240, 250), 240)
    p.disc(410, 84, 44, YELLOW)
    p.cloud(160, 70, 0.9)
    p.box(0, 236, 512, 360, (46, 146, 190))
    for x, y in ((60, 262), (300, 276), (180, 296), (420, 300)):
        p.box(x, y, x + 70, y + 5, (140, 204, 224), 2)
    p.disc(256, 470, 420, (232, 244, 246), 140)
    p.disc(256, 480, 420, SAND, 140)
    p.line(WOOD, 9, 190, 190, 206, 450)
    p.poly(RED, 60, 250, 84, 190, 130, 154, 186, 142, 244, 150, 296, 180, 326, 234)
    p.poly(WHITE, 108, 246, 130, 182, 186, 142, 162, 244)
    p.poly(WHITE, 216, 240, 228, 180, 186, 142, 272, 236)
    p.poly((66, 120, 196), 236, 452, 360, 440, 384, 474, 254, 488)
    p.disc(420, 428, 38, YELLOW)
    p.poly(WHITE, 408, 392, 432, 392, 424, 464, 414, 464)
    p.disc(420, 428, 9, RED)
    return p.image


# A picture: its parts (together the caption), what can be recoloured (thing, colour, part), replaced (part, new thing),
# removed (part, "the ..."), added (thing, where), and which changes of time and weather make sense.
OUTDOOR = {
    "at night": ("make it night, with a dark sky and stars", "make it daytime again"),
    "at sunset": ("change the time of day to sunset, with a pink and orange sky", "bring back the original sky"),
    "under a dark and stormy sky": ("make the sky dark and stormy", "clear the stormy sky"),
    "in the rain": ("make it rain", "stop the rain"),
    "in thick fog": ("cover the scene in thick fog", "remove the fog"),
    "in falling snow": ("let it snow", "stop the snow"),
    "with a rainbow in the sky": ("add a rainbow to the sky", "remove the rainbow"),
    "in the warm light of autumn": ("give it the warm light of autumn", "bring back the original light"),
}
INDOOR = {
    "by candlelight": ("light the scene by candlelight only", "bring back the even light"),
    "against a dark background": ("make the background dark", "make the background light again"),
    "with striped wallpaper behind": ("put striped wallpaper on the wall", "make the wall plain again"),
    "in bright morning sun": ("let bright morning sun fall in from the left", "bring back the even light"),
    "with a brick wall behind": ("change the wall into a brick wall", "make the wall plain again"),
    "in dim blue light": ("light the scene with a dim blue light", "bring back the even light"),
}
STYLES = ["pencil sketch", "watercolour painting", "photograph", "oil painting", "pixel-art picture",
          "stained-glass window",
          "paper-cut collage", "charcoal drawing", "mosaic", "clay model", "comic-book panel",
          "crayon drawing"]  # fmt: skip
EDIT_COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white", "turquoise"]
PICTURES = {
    "house": dict(
        draw=draw_house, outdoor=True,
        parts=["a cream house with a red roof", "a brown door", "two blue windows", "a green tree", "a yellow sun",
               "a white cloud"],
        colours=[("roof", "red", 0), ("house", "cream", 0), ("door", "brown", 1)],
        replace=[(3, "snowman"), (3, "parked bicycle"), (4, "full moon"), (5, "kite")],
        remove=[(3, "the tree"), (5, "the cloud"), (4, "the sun")],
        add=[("a white fence", "in front of the house"), ("smoke", "above the chimney"), ("a dog", "on the lawn"),
             ("flowers", "along the path"), ("a flag", "on the roof")]),
    "fruit": dict(
        draw=draw_fruit, outdoor=False,
        parts=["a wooden table", "a red apple", "a yellow banana", "an empty blue bowl"],
        colours=[("apple", "red", 1), ("banana", "yellow", 2), ("bowl", "blue", 3)],
        replace=[(1, "green pear"), (1, "orange"), (2, "bunch of grapes"), (2, "slice of melon"), (3, "glass jug")],
        remove=[(1, "the apple"), (2, "the banana"), (3, "the bowl")],
        add=[("a knife", "in front of the apple"), ("cherries", "in the bowl"), ("a wine bottle", "behind the banana"),
             ("a bee", "above the banana"), ("a white napkin", "on the table")]),
    "boat": dict(
        draw=draw_boat, outdoor=True,
        parts=["a red boat with a white sail on a blue sea", "a yellow sun", "a white cloud"],
        colours=[("boat", "red", 0), ("sail", "white", 0), ("sea", "blue", 0)],
        replace=[(1, "full moon"), (1, "hot-air balloon"), (2, "seagull"), (2, "small airplane")],
        remove=[(1, "the sun"), (2, "the cloud")],
        add=[("a dolphin", "jumping beside the boat"), ("a fisherman", "in the boat"), ("an island", "on the horizon"),
             ("a small flag", "on top of the mast"), ("a whale", "in the water"), ("a buoy", "in front of the boat")]),
    "lake": dict(
        draw=draw_lake, outdoor=True,
        parts=["three grey mountains with snow on top", "a blue lake", "a large green pine on the left",
               "a small green pine on the right"],
        colours=[("lake", "blue", 1), ("large pine", "green", 2), ("small pine", "green", 3)],
        replace=[(2, "wooden cabin"), (2, "birch"), (3, "rock"), (3, "tent")],
        remove=[(2, "the large pine"), (3, "the small pine")],
        add=[("a canoe", "on the lake"), ("an eagle", "in the sky"), ("a deer", "on the shore"),
             ("two swans", "on the water"),
             ("a campfire", "on the shore"), ("a wooden jetty", "at the edge of the lake")]),
    "vase": dict(
        draw=draw_vase, outdoor=False,
        parts=["a blue vase with a white stripe", "a red flower on the left", "a yellow flower in the middle",
               "a pink flower on the right"],
        colours=[("vase", "blue", 0), ("stripe", "white", 0), ("flower on the left", "red", 1)],
        replace=[(1, "sunflower"), (2, "white lily"), (3, "blue iris"), (3, "thistle")],
        remove=[(1, "the red flower"), (2, "the yellow flower"), (3, "the pink flower")],
        add=[("a butterfly", "on the yellow flower"), ("fallen petals", "on the table"),
             ("a teacup", "beside the vase"),
             ("a picture frame", "on the wall"), ("a lemon", "next to the vase")]),
    "cat": dict(
        draw=draw_cat, outdoor=False,
        parts=["an orange cat", "a blue sofa", "a framed picture on the wall"],
        colours=[("cat", "orange", 0), ("sofa", "blue", 1)],
        replace=[(0, "small dog"), (0, "white rabbit"), (0, "teddy bear"), (2, "round mirror"), (2, "clock"),
                 (2, "window")],
        remove=[(0, "the cat"), (2, "the picture on the wall")],
        add=[("a yellow cushion", "on the sofa"), ("a ball of wool", "in front of the cat"),
             ("a floor lamp", "beside the sofa"),
             ("a bow tie", "around the neck of the cat"), ("a striped rug", "on the floor"),
             ("a crown", "on the head of the cat")]),
    "car": dict(
        draw=draw_car, outdoor=True,
        parts=["a red car on a grey road", "green hills", "a green tree", "a yellow sun", "a white cloud"],
        colours=[("car", "red", 0), ("hills", "green", 1), ("road", "grey", 0)],
        replace=[(2, "street lamp"), (2, "windmill"), (3, "full moon"), (4, "airplane")],
        remove=[(2, "the tree"), (4, "the cloud"), (3, "the sun")],
        add=[("a surfboard", "on the roof of the car"), ("a cow", "on the hill"), ("a road sign", "beside the road"),
             ("a castle", "on the hill"), ("snow", "on the hills"), ("a bird", "in the sky")]),
    "balloon": dict(
        draw=draw_balloon, outdoor=True,
        parts=["a red and yellow hot-air balloon with a brown basket", "green fields", "a white cloud on the left",
               "a white cloud on the right"],
        colours=[("basket", "brown", 0), ("fields", "green", 1)],
        replace=[(0, "giant floating teapot"), (0, "airship"), (0, "spaceship"), (2, "flock of birds"), (3, "kite")],
        remove=[(2, "the cloud on the left"), (3, "the cloud on the right")],
        add=[("two people", "in the basket"), ("a second balloon", "far in the background"),
             ("a farmhouse", "in the fields"),
             ("a star", "on the balloon"), ("a river", "through the fields"), ("a long ribbon", "under the basket")]),
    "lighthouse": dict(
        draw=draw_lighthouse, outdoor=True,
        parts=["a red and white striped lighthouse with a brown door", "a grey rock", "a blue sea", "a white cloud"],
        colours=[("door", "brown", 0), ("sea", "blue", 2), ("rock", "grey", 1)],
        replace=[(0, "stone castle"), (0, "windmill"), (0, "giant candle"), (3, "seagull"), (3, "hot-air balloon")],
        remove=[(3, "the cloud"), (0, "the lighthouse")],
        add=[("a beam of light", "from the lantern"), ("a sailing boat", "on the sea"), ("seals", "on the rock"),
             ("a rowing boat", "at the foot of the rock"), ("seagulls", "around the tower")]),
    "desk": dict(
        draw=draw_desk, outdoor=False,
        parts=["a wooden desk", "a green lamp", "a blue book on a red book", "a white mug of steaming coffee"],
        colours=[("lamp", "green", 1), ("mug", "white", 3), ("upper book", "blue", 2)],
        replace=[(1, "potted plant"), (1, "globe"), (3, "glass of milk"), (3, "alarm clock"), (2, "laptop")],
        remove=[(1, "the lamp"), (2, "the books"), (3, "the mug")],
        add=[("a pair of glasses", "on the books"), ("a pencil", "in front of the books"),
             ("a sleeping cat", "on the desk"),
             ("a window", "in the wall"), ("a red heart", "on the mug")]),
    "snowman": dict(
        draw=draw_snowman, outdoor=True,
        parts=["a snowman with a black hat and a red scarf", "a large green pine on the left",
               "a small green pine on the right"],
        colours=[("scarf", "red", 0), ("hat", "black", 0), ("large pine", "green", 1)],
        replace=[(0, "penguin"), (0, "polar bear"), (1, "red cabin"), (2, "wooden sledge"), (2, "street lamp")],
        remove=[(1, "the large pine"), (2, "the small pine")],
        add=[("a broom", "in the hand of the snowman"), ("fairy lights", "on the large pine"), ("a fox", "in the snow"),
             ("a small bird", "on the arm of the snowman"), ("a pair of glasses", "on the face of the snowman")]),
    "city": dict(
        draw=draw_city, outdoor=True,
        parts=["a red building on the left", "a tall grey building in the middle", "a yellow building on the right",
               "an empty street"],
        colours=[("building on the left", "red", 0), ("building in the middle", "grey", 1),
             ("building on the right", "yellow", 2)],
        replace=[(0, "row of trees"), (1, "church"), (1, "giant cactus"), (2, "big Ferris wheel")],
        remove=[(0, "the red building"), (2, "the yellow building")],
        add=[("a yellow bus", "on the street"), ("a helicopter", "in the sky"), ("a traffic light", "at the kerb"),
             ("a clock", "on the building in the middle"), ("ivy", "on the red building"),
             ("two cyclists", "on the street")]),
    "desert": dict(
        draw=draw_desert, outdoor=True,
        parts=["a green cactus with a pink flower", "yellow dunes", "two brown rocks", "a pale sun"],
        colours=[("cactus", "green", 0), ("flower", "pink", 0), ("rocks", "brown", 2)],
        replace=[(0, "palm tree"), (0, "camel"), (0, "stone statue"), (2, "pyramids"), (3, "full moon")],
        remove=[(2, "the rocks"), (0, "the cactus")],
        add=[("a cowboy hat", "on the cactus"), ("a lizard", "on a rock"), ("a vulture", "in the sky"),
             ("a small pond", "in the sand"),
             ("a row of camels", "on the dune")]),
    "fishbowl": dict(
        draw=draw_fishbowl, outdoor=False,
        parts=["an orange fish with a white stripe in a round glass bowl", "green water plants", "a brown table"],
        colours=[("fish", "orange", 0), ("stripe", "white", 0), ("water plants", "green", 1), ("table", "brown", 2)],
        replace=[(1, "corals"), (1, "sunken columns")],
        remove=[(1, "the water plants")],
        add=[("a tiny castle", "on the floor of the bowl"), ("a second fish", "behind the first"),
             ("a cat", "beside the bowl"),
             ("a snail", "on the glass"), ("a starfish", "on the sand"), ("a treasure chest", "on the sand")]),
    "cake": dict(
        draw=draw_cake, outdoor=False,
        parts=["a chocolate cake with pink icing", "four red berries", "three burning candles", "a white plate"],
        colours=[("icing", "pink", 0), ("berries", "red", 1), ("plate", "white", 3)],
        replace=[(1, "chocolate hearts"), (1, "blueberries"), (2, "paper flags"), (2, "sparklers")],
        remove=[(2, "the candles"), (1, "the berries")],
        add=[("a wrapped gift", "beside the cake"), ("balloons", "in the background"), ("a fork", "on the plate"),
             ("white sprinkles", "on the icing"), ("a mouse", "beside the plate"), ("confetti", "on the table")]),
    "beach": dict(
        draw=draw_beach, outdoor=True,
        parts=["a red and white umbrella", "a blue towel", "a yellow and white ball", "a blue sea", "a yellow sun",
               "a white cloud"],
        colours=[("towel", "blue", 1), ("sea", "blue", 3), ("sun", "yellow", 4)],
        replace=[(0, "palm tree"), (0, "striped tent"), (2, "sandcastle"), (2, "watermelon"), (5, "seagull")],
        remove=[(0, "the umbrella"), (2, "the ball"), (1, "the towel")],
        add=[("a crab", "on the sand"), ("a sailing boat", "on the sea"), ("a bucket and spade", "beside the towel"),
             ("footprints", "in the sand"), ("sunglasses", "on the towel")]),
}  # fmt: skip


def caption(parts, style="flat illustration", ambience=""):
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{a(style)} of {listed}{f', {ambience}' if ambience else ''}"


def is_many(thing):
    """Plural or without a count: no article."""
    return thing.rsplit(" ", 1)[-1] in ("pyramids", "corals", "columns", "hearts", "blueberries", "flags", "sparklers")


def edits_of(name, picture, r):
    """25 dicts of one picture: 6 ambience and style, the rest what can be done to its things."""
    before = caption(picture["parts"])

    def edit(instruction, reverse, parts=picture["parts"], **how):
        return {"image": f"edit_images/{name}.png", "prompt": instruction, "caption": before,
                "target_caption": caption(parts, **how), "reverse_prompt": reverse}  # fmt: skip

    def changed(index, *new):
        return picture["parts"][:index] + list(new) + picture["parts"][index + 1 :]

    dark = ("at night", "under a dark and stormy sky")
    ambience = [
        edit(there, back, [p for p in picture["parts"] if not (light in dark and p.endswith(" sun"))], ambience=light)
        for light, (there, back) in (OUTDOOR if picture["outdoor"] else INDOOR).items()
        if (name, light) != ("snowman", "in falling snow")  # it snows already
    ]
    styles = []
    for style in STYLES:
        form = r.choice(["turn the picture into {}", "redraw it as {}", "make it look like {}"])
        styles.append(edit(form.format(a(style)), "turn it back into a flat illustration", style=style))
    recolour = []
    for thing, colour, index in picture["colours"]:
        for new in r.sample([c for c in EDIT_COLOURS if c != colour], 6):
            there, back = r.choice([
                ("change the colour of the {t} from {c} to {n}", "change the colour of the {t} from {n} to {c}"),
                ("make the {t} {n}", "make the {t} {c} again"),
                ("make the {t} {n} instead of {c}", "make the {t} {c} instead of {n}"),
            ])  # fmt: skip
            words = dict(t=thing, c=colour, n=new)
            part = recoloured(picture["parts"][index], thing, colour, new)
            recolour.append(edit(there.format(**words), back.format(**words), changed(index, part)))
    replace = []
    for index, new in picture["replace"]:
        old = picture["parts"][index]
        bare = old.split(" with ")[0].split(" ", 1)[1]
        new_one = new if is_many(new) else a(new)
        counted = old.startswith(("two ", "three ", "four "))
        old_one = old if old.startswith(("a ", "an ")) else bare if counted else old
        the_old = bare if counted or old.startswith(("a ", "an ")) else old
        replace.append(
            edit(f"replace the {the_old} with {new_one}", f"replace the {new} with {old_one}", changed(index, new_one))
        )
    remove = [edit(f"remove {thing}", f"add {picture['parts'][k]}", changed(k)) for k, thing in picture["remove"]]
    add = []
    for thing, where in picture["add"]:
        bare = thing.removeprefix("a ").removeprefix("an ")
        add.append(edit(f"add {thing} {where}", f"remove the {bare} {where}", [*picture["parts"], f"{thing} {where}"]))
    chosen = r.sample(ambience, 3) + r.sample(styles, 3) + replace + remove + add
    return chosen + r.sample(recolour, 25 - len(chosen))


def recoloured(part, thing, old, new):
    """ "an orange cat", "cat", "orange",
    "black" -> "a black cat": the colour word before the thing, and its article."""
    head = thing.split(" on ")[0].split(" in ")[0].split()[-1]
    end = part.index(head)
    at = part.rindex(old, 0, end)
    start = part[:at]
    words = start.split(" ")
    if len(words) > 1 and words[-2] in ("a", "an"):
        words[-2] = a(new).split(" ")[0]
    return " ".join(words) + new + part[at + len(old) :]


def edits():
    """400 dicts; the pictures they name come from pictures()."""
    r = random.Random("edits")
    lines = [line for name, picture in PICTURES.items() for line in edits_of(name, picture, r)]
    r.shuffle(lines)
    return lines


def pictures():
    """name -> PIL image, 512 x 512; 96 colours make each file a few KB."""
    small = {name: picture["draw"]().resize((512, 512), Image.LANCZOS) for name, picture in PICTURES.items()}
    return {
        name: image.quantize(96, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE) for name, image in small.items()
    }


# ----------------------------------------------------------------------------------------------------------------------


def texts():
    """file name -> text, every prompt file."""
    return {
        "scenes.txt": "".join(f"{line}\n" for line in collect(scene, 4000, "scenes")),
        "ocr.txt": "".join(f"{line}\n" for line in collect(ocr_prompt, 2000, "ocr")),
        "geneval_train.jsonl": "".join(f"{json.dumps(line)}\n" for line in geneval()),
        "edits.jsonl": "".join(f"{json.dumps(line)}\n" for line in edits()),
    }


def main():
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    (FOLDER / "edit_images").mkdir(exist_ok=True)
    for name, image in pictures().items():
        image.save(FOLDER / "edit_images" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
